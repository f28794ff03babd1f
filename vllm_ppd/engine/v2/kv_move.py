"""KV compaction on V2: accepted rows go right behind their context."""

from __future__ import annotations

from typing import Any

import torch

from vllm_ppd.engine.kv_caches import attention_caches
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.triton.kv_compact import KVCompactor
from vllm_ppd.kernels.triton.tree_walk import Walk


class PathMover:
    """Moves the accepted rows' KV, in every layer of every KV cache group.

    Args:
        runner: a V2 model runner whose KV caches are allocated.

    Raises:
        PPDConfigError: as `attention_caches`.
    """

    def __init__(self, runner: Any):
        self._block_tables = runner.block_tables
        self.groups = [
            KVCompactor([view for cache in caches for view in _views(cache)])
            for caches in attention_caches(runner)
        ]

    def move(self, walk: Walk, starts: torch.Tensor) -> None:
        """Copy the KV of every path's row ``d`` to where row ``d`` of its tree is.

        Args:
            starts: int [B] row of each root.
        """
        slots_of_groups = self._block_tables.slot_mappings
        for compactor, slots in zip(self.groups, slots_of_groups, strict=True):
            compactor.run(slots, starts, walk.paths, walk.num_sampled)


def _views(cache: torch.Tensor) -> list[torch.Tensor]:
    """A cache as [num_blocks, kv_heads, block_size, width] tensors."""
    if cache.device.type == "cpu":
        return [key_view(cache), value_view(cache)]
    return [cache]
