"""What the scheduler may see of the guesses: the ones that are words."""

from __future__ import annotations

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler


class WordDraftsHandler(DraftTokensHandler):
    """vLLM's handler; prompt tokens go to the scheduler as its padding, -1.

    Only structured outputs send guesses to the scheduler, which checks them against
    the grammar up to the first -1. A line's prompt tokens all come after its words.
    """

    def __init__(self, device: torch.device, vocab_size: int):
        super().__init__(device)
        self._vocab_size = vocab_size

    def set_draft_tokens(
        self, input_batch: InputBatch, draft_tokens: torch.Tensor
    ) -> None:
        if input_batch.has_structured_output_reqs:
            soft = draft_tokens >= self._vocab_size
            draft_tokens = draft_tokens.masked_fill(soft, -1)
        super().set_draft_tokens(input_batch, draft_tokens)
