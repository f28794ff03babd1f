"""The speculator of vLLM's V2 runner: drafts from prompt rows, n-grams and bigrams.

Nothing leaves the device: drafts are made from what the target's own step computed,
from the requests' tokens, and from a table of bigrams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler
from vllm.v1.worker.gpu.states import RequestState

from vllm_ppd.engine.settings import serving_settings
from vllm_ppd.engine.v2.request_trees import RequestTrees
from vllm_ppd.engine.v2.step_trees import StepBuffers, step_of
from vllm_ppd.kernels.triton.fill_tree import DeviceDraftInputs, fill_tree
from vllm_ppd.kernels.triton.ngram import match_ngrams
from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.drafting import POOL

# Last tokens of a request among which an n-gram match is looked up.
_NGRAM_WINDOW = 4096


class RequestContext(NamedTuple):
    """What requests' own tokens say about the next ones. B requests."""

    roots: torch.Tensor  # int32 [B]: the last token
    match_classes: torch.Tensor  # int32 [B]: class of the n-gram match's length
    ngram_drafts: torch.Tensor  # int32 [B, L]: what came after the match, -1 padded


class Drafter:
    """Chooses the draft tokens of trees, on the device.

    Args:
        requests: the trees.
        vocab_size: V.
        states: vLLM's state of all requests.
        bigram: the bigram table, if there is one.
        weights: [M] its weight at each prompt token.
    """

    def __init__(
        self,
        requests: RequestTrees,
        vocab_size: int,
        states: RequestState,
        bigram: BigramTensors | None,
        weights: Sequence[float],
    ):
        device = states.device
        self._tables = requests.tables
        self._states = states
        self._pool = min(max(POOL, requests.max_children + 1), vocab_size)
        # Chains are the last class.
        self._matching = requests.menu.num_classes > 2
        num_slots = states.max_num_reqs
        # Stand for what is not looked up, or not there.
        self._zeros = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._no_ngrams = self._zeros.new_full((num_slots, 1), -1)
        prompts = max(1, self._tables.num_prompt_tokens)
        self._no_logits = torch.zeros(1, device=device).expand(1, prompts, vocab_size)
        self._no_pool = torch.zeros(
            1, prompts, self._pool, dtype=torch.int64, device=device
        )
        self._no_scores = torch.zeros(1, prompts, self._pool, device=device)
        self._bigram = bigram
        self._weights = torch.tensor(weights, device=device)

    def context(self, slots: torch.Tensor) -> RequestContext:
        """What is known of requests without any prompt row; slots are int64 [B]."""
        tokens, ends = self._states.all_token_ids.gpu, self._states.total_len.gpu
        roots = tokens[slots, ends[slots] - 1]
        if self._matching:
            return RequestContext(
                roots, *match_ngrams(tokens, slots, ends, _NGRAM_WINDOW)
            )
        num_reqs = len(slots)
        return RequestContext(roots, self._zeros[:num_reqs], self._no_ngrams[:num_reqs])

    def fill(
        self,
        tree_ids: torch.Tensor,  # int64 [B]
        context: RequestContext,
        num_prompted: torch.Tensor | None,  # int [B]: prompt tokens with logits
        logits: torch.Tensor | None,  # float [B, M, V]
        drafts: torch.Tensor,  # int64 [B, K]: written
    ) -> None:
        """Write the rows after the root of each request's tree."""
        if logits is None or num_prompted is None:
            num_prompted, logits = self._zeros[: len(tree_ids)], self._no_logits
            pool, scores = self._no_pool, self._no_scores
        else:
            scores, pool = logits.topk(self._pool)
        fill_tree(
            self._tables,
            tree_ids,
            DeviceDraftInputs(
                num_prompted, logits, pool, scores, context.roots, context.ngram_drafts
            ),
            self._bigram,
            self._weights,
            drafts,
        )


class PPDSpeculator(BaseSpeculator):
    """Has no model and no KV: drafts are outputs of the target's own step.

    vLLM keeps the drafts, [slots, K], in its request states and feeds them after the
    root of the next step; row layout and ids are those of the request's tree.

    Attributes:
        requests: the trees between steps.
        buffers: those of the step that runs.
        model: the target, set once vLLM has loaded it.
        online_bigram: the bigram table and its counts; None if it does not learn.
    """

    supports_mm_inputs = False
    draft_logits = None
    model: Any = None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, states: RequestState
    ):
        settings = serving_settings(vllm_config)
        bigram, weights, self.online_bigram = settings.served_bigram(device)
        num_slots, num_drafts = states.max_num_reqs, states.num_speculative_steps
        vocab_size = settings.vocab_size
        self.requests = RequestTrees(
            settings.tree_menu(), vocab_size, num_drafts, num_slots, device
        )
        self.buffers = StepBuffers(
            self.requests, num_slots, states.max_num_batched_tokens
        )
        self._drafter = Drafter(self.requests, vocab_size, states, bigram, weights)
        self._drafts = torch.zeros(
            num_slots, num_drafts, dtype=torch.int64, device=device
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of ours is captured; the target's graphs hold the trees."""

    def capture(self) -> None:
        """See init_cudagraph_manager."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,  # [rows of the step, hidden]
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft for the next step, with the menu entry of its draft length.

        Before a plain step nothing is done, and vLLM does not read the drafts.

        Returns:
            int64 [B, K] draft ids, in a buffer that the next call overwrites.
        """
        num_reqs = input_batch.num_reqs
        drafts = self._drafts[:num_reqs]
        if dummy_run:
            if is_profile:
                self._use_as_much_memory_as_a_step(num_reqs, last_hidden_states)
            return drafts
        entry = self.requests.menu.entry_of(num_speculative_tokens or 0)
        if entry is None:
            return drafts
        step, slots = step_of(input_batch), input_batch.idx_mapping
        walk = None if step is None else step.walk
        num_prompted, logits = None, None
        if walk is not None:
            num_prompted = walk.num_prompted
            logits = self._prompt_logits(walk.prompt_rows, last_hidden_states)
        context = self._drafter.context(slots)
        tree_ids = self.requests.grow(
            entry,
            slots,
            input_batch.idx_mapping_np,
            context.match_classes,
            num_prompted,
        )
        self._drafter.fill(tree_ids, context, num_prompted, logits, drafts)
        return drafts

    def _prompt_logits(
        self,
        prompt_rows: torch.Tensor,  # int [B, M * EPTs]
        hidden: torch.Tensor,
    ) -> torch.Tensor | None:
        """float [B, M, V] of each prompt token of the nodes where walks ended."""
        tables = self.requests.tables
        if not tables.num_prompt_tokens:
            return None
        logits = self.model.compute_logits(hidden[prompt_rows.flatten()])
        shape = len(prompt_rows), tables.num_prompt_tokens, tables.num_ept, -1
        logits = logits.view(shape)
        # The EPTs of a prompt token vote by mean.
        return logits.mean(2) if tables.num_ept > 1 else logits[:, :, 0]

    def _use_as_much_memory_as_a_step(
        self, num_reqs: int, hidden: torch.Tensor
    ) -> None:
        """vLLM's memory profile runs one row of logits per request; a step has more."""
        tables = self.requests.tables
        # Nodes are rows of the step, of which there are as many as hidden states.
        nodes = min(num_reqs * self.requests.most_nodes, len(hidden))
        prompts = num_reqs * tables.num_prompt_tokens * tables.num_ept
        for rows in (nodes, prompts):
            index = torch.arange(max(1, rows), device=hidden.device) % len(hidden)
            self.model.compute_logits(hidden[index])


class WordDraftsHandler(DraftTokensHandler):
    """vLLM's handler; prompt tokens go to the scheduler as its padding, -1.

    Only structured outputs send drafts to the scheduler, which checks them against the
    grammar up to the first -1. A chain's prompt tokens all come after its draft tokens.
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
