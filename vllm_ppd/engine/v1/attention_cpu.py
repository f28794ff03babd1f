"""vLLM's CPU attention backend, with a tree mask for the rows that need one."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_ppd.engine.attention import TreeImplMixin, TreeMetadataMixin
from vllm_ppd.kernels.cpu import CpuTreeAttention


class PPDCPUAttentionMetadataBuilder(TreeMetadataMixin, CPUAttentionMetadataBuilder):
    isa: str
    plan_class = CpuTreeAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == "amx":
            # AMX packs the cache in tiles that the tree kernel cannot read.
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)


class PPDCPUAttentionImpl(TreeImplMixin, CPUAttentionBackendImpl):
    pass


class PPDCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[PPDCPUAttentionImpl]:
        return PPDCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PPDCPUAttentionMetadataBuilder]:
        return PPDCPUAttentionMetadataBuilder
