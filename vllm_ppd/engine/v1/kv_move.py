"""KV compaction in vLLM's caches: accepted rows go right behind their context."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_ppd.kernels.cpu import CpuKVCompactor


class KVMover:
    """Moves KV between rows of a step, in every layer of every KV cache group.

    Args:
        runner: a V1 model runner whose KV caches are allocated.

    Raises:
        ValueError: a cache group that is not plain attention.
    """

    def __init__(self, runner: Any):
        self._block_tables = runner.input_batch.block_table
        forward_context = runner.compilation_config.static_forward_context
        self._groups = []
        for group in runner.kv_cache_config.kv_cache_groups:
            if not isinstance(
                group.kv_cache_spec, FullAttentionSpec | SlidingWindowSpec
            ):
                raise ValueError(
                    "speculative method 'ppd' needs plain attention layers, and found "
                    f"{type(group.kv_cache_spec).__name__}: serve without PPD"
                )
            # Layers may share one cache; moving its rows twice would lose them.
            caches = {
                cache.data_ptr(): cache
                for name in group.layer_names
                if (cache := forward_context[name].kv_cache) is not None
            }
            self._groups.append(CpuKVCompactor(list(caches.values())))

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy the KV of row ``sources[i]`` to where row ``targets[i]``'s is, in order.

        Args:
            sources, targets: [n] rows of the step.
        """
        for group, compactor in enumerate(self._groups):
            slots = self._block_tables[group].slot_mapping.gpu
            rows = torch.from_numpy(np.stack([sources, targets])).to(slots.device)
            source, target = slots[rows].to(torch.int64)
            compactor.run(source, target)
