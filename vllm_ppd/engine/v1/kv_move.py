"""KV compaction in vLLM's caches: accepted rows go right behind their context."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_ppd.engine.kv_caches import attention_caches
from vllm_ppd.kernels.cpu.kv_compact import CpuKVCompactor


class KVMover:
    """Moves KV between rows of a step, in every layer of every KV cache group.

    Args:
        runner: a V1 model runner whose KV caches are allocated.

    Raises:
        PPDConfigError: as `attention_caches`.
    """

    def __init__(self, runner: Any):
        self._block_tables = runner.input_batch.block_table
        self.groups = [CpuKVCompactor(caches) for caches in attention_caches(runner)]

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy the KV of row ``sources[i]`` to where row ``targets[i]``'s is, in order.

        Args:
            sources, targets: [n] rows of the step.
        """
        for group, compactor in enumerate(self.groups):
            slots = self._block_tables[group].slot_mapping.gpu
            rows = torch.from_numpy(np.stack([sources, targets])).to(slots.device)
            source, target = slots[rows].to(torch.int64)
            compactor.run(source, target)
