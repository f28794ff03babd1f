"""What an attention backend of vLLM needs to serve tree rows: two mixins.

The stock kernels know causal rows only. In a step with trees the stock kernel runs
for the whole batch unless the batch is nothing but trees, and the tree kernel then
writes the tree rows' attention over what it left there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ppd.engine.v1 import step_context
from vllm_ppd.kernels.tree_attention import TreeBatch


class TreePlan(Protocol):
    """One step's tree attention: built from a TreeBatch, run once per layer."""

    def __init__(self, batch: TreeBatch) -> None: ...

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        softcap: float,
        window: int,
    ) -> None: ...


class TreeMetadataMixin:
    """Goes before a metadata builder; its metadata carry the step's tree plan."""

    plan_class: ClassVar[type[TreePlan]]

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
        context = step_context.current
        if context is None:
            return metadata
        table = common_attn_metadata.block_table_tensor
        metadata.ppd_plan = self.plan_class(
            TreeBatch(
                block_table=table[context.requests],
                starts=context.starts,
                num_rows=context.num_rows,
                context_lens=context.context_lens,
                ancestors=context.ancestors,
                depths=context.depths,
            )
        )
        metadata.ppd_only_trees = context.only_trees
        return metadata


class TreeImplMixin:
    """Goes before an attention implementation; runs the plan where there is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "sinks", None) is not None:
            raise ValueError(
                "speculative method 'ppd' does not support attention sinks: serve "
                "this model without PPD"
            )

    @property
    def _window(self) -> int:
        """Keys a row may see under a sliding window; not positive for all."""
        # FlashAttention keeps (keys to the left, keys to the right).
        window = self.sliding_window  # type: ignore[attr-defined]
        return window[0] + 1 if isinstance(window, tuple) else window

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        plan = getattr(attn_metadata, "ppd_plan", None)
        if plan is None or not attn_metadata.ppd_only_trees:
            output = super().forward(  # type: ignore[misc]
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                *args,
                **kwargs,
            )
        if plan is not None:
            plan.run(
                query,
                kv_cache,
                output,
                self.scale,  # type: ignore[attr-defined]
                self.logits_soft_cap,  # type: ignore[attr-defined]
                self._window,
            )
        return output
