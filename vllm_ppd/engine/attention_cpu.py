"""vLLM's CPU attention backend with a tree mask for the rows that need one.

The stock kernel knows causal rows only. In a step with trees it runs for the whole
batch unless the batch is nothing but trees, and the tree kernel then writes the tree
rows' attention over what it left there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_ppd.engine import step_context
from vllm_ppd.kernels.cpu import CpuTreeAttention
from vllm_ppd.kernels.tree_attention import TreeBatch


class PPDCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[PPDCPUAttentionImpl]:
        return PPDCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PPDCPUAttentionMetadataBuilder]:
        return PPDCPUAttentionMetadataBuilder


class PPDCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == "amx":
            # AMX packs the cache in tiles that the tree kernel cannot read.
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        context = step_context.current
        plan = None
        if context is not None:
            table = common_attn_metadata.block_table_tensor
            plan = CpuTreeAttention(
                TreeBatch(
                    block_table=table[context.requests],
                    starts=context.starts,
                    num_rows=context.num_rows,
                    context_lens=context.context_lens,
                    ancestors=context.ancestors,
                    depths=context.depths,
                )
            )
        metadata.ppd_plan = plan
        metadata.ppd_only_trees = context is not None and context.only_trees
        return metadata


class PPDCPUAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sinks is not None:
            raise ValueError(
                "speculative method 'ppd' does not support attention sinks on CPU: "
                "serve this model without PPD"
            )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = getattr(attn_metadata, "ppd_plan", None)
        if plan is None or not attn_metadata.ppd_only_trees:
            output = super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if plan is not None:
            plan.run(
                query,
                kv_cache,
                output,
                self.scale,
                self.logits_soft_cap,
                self.sliding_window,
            )
        return output
