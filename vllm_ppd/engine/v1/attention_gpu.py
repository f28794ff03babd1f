"""vLLM's FlashAttention backend, with a tree mask for the rows that need one.

Tree rows go through plain torch here, request by request: right, but not fast.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_ppd.engine.attention import TreeImplMixin, TreeMetadataMixin
from vllm_ppd.kernels.tree_attention import TreeBatch, tree_attention_reference


class TorchTreeAttention:
    """The reference kernel on vLLM's GPU cache layout."""

    def __init__(self, batch: TreeBatch) -> None:
        self.batch = batch

    def run(
        self,
        query: torch.Tensor,  # [T, H, D]
        kv_cache: torch.Tensor,  # [num_blocks, kv_heads, block_size, 2 * D]
        output: torch.Tensor,  # [T, H, D]
        scale: float,
        softcap: float,
        window: int,
    ) -> None:
        keys, values = kv_cache.split(query.shape[-1], dim=-1)
        tree_attention_reference(
            query, keys, values, output, self.batch, scale, softcap, window
        )


class PPDFlashAttentionMetadataBuilder(
    TreeMetadataMixin, FlashAttentionMetadataBuilder
):
    plan_class = TorchTreeAttention


class PPDFlashAttentionImpl(TreeImplMixin, FlashAttentionImpl):
    pass


class PPDFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        # vLLM looks names up in its enum of backends.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PPDFlashAttentionImpl]:
        return PPDFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PPDFlashAttentionMetadataBuilder]:
        return PPDFlashAttentionMetadataBuilder
