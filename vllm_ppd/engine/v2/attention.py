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


def _with_trees(
    name: str, stock: Any, implementation: type, builder: type, **names: str
) -> Any:
    """A backend of vLLM with tree attention; vLLM looks its name up in an enum."""
    classes = {
        "get_impl_cls": type(f"{name}Impl", (TreeImplMixin, implementation), {}),
        "get_builder_cls": type(
            f"{name}Builder", (DeviceTreeMetadataMixin, builder), {}
        ),
    }

    def returns(value: Any) -> Any:
        return staticmethod(lambda: value)

    methods = {method: returns(value) for method, value in (classes | names).items()}
    return type(name, (stock,), {**methods, "__module__": __name__})


TreeFlashAttentionBackend = _with_trees(
    "TreeFlashAttentionBackend",
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    get_name="CUSTOM",
)
TreeTritonAttentionBackend = _with_trees(
    "TreeTritonAttentionBackend",
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
    get_name="CUSTOM",
)
PPDCPUAttentionBackendV2 = _with_trees(
    "PPDCPUAttentionBackendV2",
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
