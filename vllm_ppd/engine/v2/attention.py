"""vLLM's attention backends with the tree kernel for the rows that need it.

On a GPU FlashAttention where it can, which is everywhere but for float32, else Triton.
On a CPU vLLM's own backend, to test without a GPU what GPUs run.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_ppd.engine.attention import TreeImplMixin, current_step
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.triton.tree_attention import tree_attention

__all__ = ["PPDCPUAttentionBackendV2", "gpu_backend_path"]


def gpu_backend_path(dtype: torch.dtype) -> str:
    """What to register for vLLM's CUSTOM backend, for a model of this type."""
    name = "Triton" if dtype == torch.float32 else "Flash"
    return f"{__name__}.Tree{name}AttentionBackend"


class DeviceTreeAttention:
    """One step's tree attention, all of it read from device memory."""

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
        if kv_cache.device.type == "cpu":
            keys, values = key_view(kv_cache), value_view(kv_cache)
        else:
            keys, values = kv_cache.split(query.shape[-1], dim=-1)
        tree_attention(query, keys, values, output, self.batch, scale, softcap, window)


class DeviceTreeMetadataMixin:
    """Goes before a metadata builder; its metadata carry the step's tree attention."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, *args, **kwargs
        )
        metadata.ppd_plan, metadata.ppd_only_trees = None, False
        step = current_step()
        if step is not None:
            batch = step.attention_batch(common_attn_metadata.block_table_tensor)
            metadata.ppd_plan = DeviceTreeAttention(batch)
            metadata.ppd_only_trees = step.only_trees
        return metadata


class _FlashMetadataBuilder(DeviceTreeMetadataMixin, FlashAttentionMetadataBuilder):
    pass


class _FlashImpl(TreeImplMixin, FlashAttentionImpl):
    pass


class TreeFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        # vLLM looks names up in its enum of backends.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return _FlashImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return _FlashMetadataBuilder


class _TritonMetadataBuilder(DeviceTreeMetadataMixin, TritonAttentionMetadataBuilder):
    pass


class _TritonImpl(TreeImplMixin, TritonAttentionImpl):
    pass


class TreeTritonAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return _TritonImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return _TritonMetadataBuilder


class _CPUMetadataBuilder(DeviceTreeMetadataMixin, CPUAttentionMetadataBuilder):
    pass


class _CPUImpl(TreeImplMixin, CPUAttentionBackendImpl):
    pass


class PPDCPUAttentionBackendV2(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[Any]:
        return _CPUImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return _CPUMetadataBuilder
