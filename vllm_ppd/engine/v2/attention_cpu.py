"""vLLM's CPU attention backend under V2: there to test without a GPU what GPUs run."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadataBuilder,
)

from vllm_ppd.engine.v1.attention_cpu import PPDCPUAttentionImpl
from vllm_ppd.engine.v2.attention import DeviceTreeMetadataMixin


class PPDCPUAttentionMetadataBuilderV2(
    DeviceTreeMetadataMixin, CPUAttentionMetadataBuilder
):
    pass


class PPDCPUAttentionBackendV2(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[PPDCPUAttentionImpl]:
        return PPDCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PPDCPUAttentionMetadataBuilderV2]:
        return PPDCPUAttentionMetadataBuilderV2
