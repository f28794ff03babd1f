"""vLLM's CPU attention backend, with a tree mask for the rows that need one."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_ppd.engine.attention import TreeImplMixin, current_step
from vllm_ppd.kernels.cpu.tree_attention import CpuTreeAttention
from vllm_ppd.kernels.tree_attention import TreeBatch


class PPDCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    isa: str

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
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        metadata = super().build(
            common_prefix_len, common_attn_metadata, *args, **kwargs
        )
        trees = current_step()
        if trees is not None:
            table = common_attn_metadata.block_table_tensor
            metadata.ppd_plan = CpuTreeAttention(
                TreeBatch(
                    block_table=table[trees.requests],
                    starts=trees.starts,
                    num_rows=trees.num_rows,
                    context_lens=trees.context_lens,
                    ancestors=trees.ancestors,
                    depths=trees.depths,
                )
            )
            metadata.ppd_only_trees = trees.only_trees
        return metadata


class PPDCPUAttentionImpl(TreeImplMixin, CPUAttentionBackendImpl):
    pass


class PPDCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[PPDCPUAttentionImpl]:
        return PPDCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PPDCPUAttentionMetadataBuilder]:
        return PPDCPUAttentionMetadataBuilder
