"""KV compaction on V2: accepted rows go right behind their context."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_ppd.config import PPDConfigError
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.triton.kv_compact import KVCompactor
from vllm_ppd.kernels.triton.tree_walk import Walk


class PathMover:
    """Moves the accepted rows' KV, in every layer of every KV cache group.

    Args:
        runner: a V2 model runner whose KV caches are allocated.

    Raises:
        PPDConfigError: a cache that is not plain attention's, or of 8-bit values.
    """

    def __init__(self, runner: Any):
        self._block_tables = runner.block_tables
        layers = runner.compilation_config.static_forward_context
        self._groups = []
        for group in runner.kv_cache_config.kv_cache_groups:
            if not isinstance(
                group.kv_cache_spec, FullAttentionSpec | SlidingWindowSpec
            ):
                raise PPDConfigError(
                    "speculative method 'ppd' needs plain attention layers, not "
                    f"{type(group.kv_cache_spec).__name__}: serve without PPD"
                )
            # Layers may share one cache; moving its rows twice would lose them.
            caches = {
                cache.data_ptr(): cache
                for name in group.layer_names
                if (cache := layers[name].kv_cache) is not None
            }
            if any(cache.element_size() == 1 for cache in caches.values()):
                # A checkpoint can ask for it, whatever --kv-cache-dtype says.
                raise PPDConfigError(
                    "speculative method 'ppd' cannot read a KV cache of 8-bit values, "
                    "which this model has: serve with --kv-cache-dtype bfloat16"
                )
            views = [view for cache in caches.values() for view in _views(cache)]
            self._groups.append(KVCompactor(views))

    def move(self, walk: Walk, starts: torch.Tensor) -> None:
        """Copy the KV of every path's row ``d`` to where row ``d`` of its tree is.

        Args:
            starts: int [B] row of each root.
        """
        for compactor, slots in zip(
            self._groups, self._block_tables.slot_mappings, strict=True
        ):
            compactor.run(slots, starts, walk.paths, walk.num_sampled)


def _views(cache: torch.Tensor) -> list[torch.Tensor]:
    """A cache as [num_blocks, kv_heads, block_size, width] tensors."""
    if cache.device.type == "cpu":
        return [key_view(cache), value_view(cache)]
    return [cache]
