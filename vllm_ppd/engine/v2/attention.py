"""Tree attention on V2, and vLLM's GPU backends with it: FlashAttention where it can,
which is everywhere but for float32, else Triton.
"""

from __future__ import annotations

import torch
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

from vllm_ppd.engine.attention import tree_backend
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


TreeFlashAttentionBackend = tree_backend(
    "TreeFlashAttentionBackend",
    __name__,
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    get_name="CUSTOM",
)
TreeTritonAttentionBackend = tree_backend(
    "TreeTritonAttentionBackend",
    __name__,
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
    get_name="CUSTOM",
)
