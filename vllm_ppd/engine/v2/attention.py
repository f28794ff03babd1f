"""Attention metadata with the device's trees, and the kernel that reads them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ppd.engine.v2 import request_trees as trees
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.triton.tree_attention import tree_attention


class DevicePlan:
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
    """Goes before a metadata builder; its metadata carry the step's tree plan."""

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
        if trees.current is not None:
            table = common_attn_metadata.block_table_tensor
            batch, metadata.ppd_only_trees = trees.current.batch(table)
            metadata.ppd_plan = DevicePlan(batch)
        return metadata
