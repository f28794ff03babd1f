"""vLLM's GPU attention backends with the tree kernel for the rows that need it.

FlashAttention where it can, which is everywhere but for float32, and else Triton.
"""

from __future__ import annotations

from typing import Any

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

from vllm_ppd.engine.attention import TreeImplMixin
from vllm_ppd.engine.v2.attention import DeviceTreeMetadataMixin


def backend_path(dtype: torch.dtype) -> str:
    """What to register for vLLM's CUSTOM backend, for a model of this type."""
    name = "Triton" if dtype == torch.float32 else "Flash"
    return f"{__name__}.Tree{name}AttentionBackend"


class TreeFlashAttentionMetadataBuilder(
    DeviceTreeMetadataMixin, FlashAttentionMetadataBuilder
):
    pass


class TreeFlashAttentionImpl(TreeImplMixin, FlashAttentionImpl):
    pass


class TreeFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        # vLLM looks names up in its enum of backends.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return TreeFlashAttentionMetadataBuilder


class TreeTritonAttentionMetadataBuilder(
    DeviceTreeMetadataMixin, TritonAttentionMetadataBuilder
):
    pass


class TreeTritonAttentionImpl(TreeImplMixin, TritonAttentionImpl):
    pass


class TreeTritonAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return TreeTritonAttentionMetadataBuilder
