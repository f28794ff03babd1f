"""Soft tokens: ids past the vocabulary that stand for trained embeddings."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_ppd.prompt_tokens.tokens import PromptTokens


class SoftTokenEmbedding(VocabParallelEmbedding):
    """Input embedding whose ids from ``first_soft_id`` on come from their own table.

    An already built embedding becomes one by changing its class, so weights, sharding
    and a tied LM head stay as they are. Every tensor-parallel rank holds the table.
    """

    first_soft_id: int
    soft_table: torch.Tensor  # [soft tokens, hidden]

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        soft = input_ >= self.first_soft_id
        # vLLM pads with -1; no such row is ever read, but it must not be looked up.
        words = super().forward(torch.where(soft, 0, input_).clamp_(min=0))
        prompts = self.soft_table[(input_ - self.first_soft_id).clamp_(min=0)]
        return torch.where(soft.unsqueeze(-1), prompts.to(words.dtype), words)


def add_soft_tokens(
    model: torch.nn.Module, path: str | None, first_soft_id: int
) -> None:
    """Give a loaded vLLM model the ids ``first_soft_id ...`` for prompt tokens.

    Args:
        model: a vLLM causal LM.
        path: folder of the prompt tokens; None for none.
        first_soft_id: the vocabulary's size.

    Raises:
        ValueError: the model has not exactly one plain input embedding.
    """
    embeddings = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
    ]
    if len(embeddings) != 1 or type(embeddings[0][1]) is not VocabParallelEmbedding:
        names = ", ".join(f"{n} ({type(m).__name__})" for n, m in embeddings) or "none"
        raise ValueError(
            "speculative method 'ppd' needs a model with one VocabParallelEmbedding "
            f"as its input embedding, and found {names}"
        )
    embedding = embeddings[0][1]
    weight = embedding.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    # Without prompt tokens a row that no id stands for: padding is caught all the same.
    rows = torch.zeros(1, embedding.embedding_dim)
    if path is not None:
        rows = PromptTokens.load(path).rows
    embedding.register_buffer(
        "soft_table", rows.to(device=weight.device, dtype=dtype), persistent=False
    )
    embedding.first_soft_id = first_soft_id
    embedding.__class__ = SoftTokenEmbedding
