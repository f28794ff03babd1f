"""One step's trees on V1, as the attention layers see them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ppd.kernels.cpu.tree_attention import CpuTreeAttention
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.trees.layout import TreeStep, spread


@dataclass(frozen=True)
class StepTrees:
    """The trees of one step.

    Attributes:
        requests: [R] index of each tree request in the batch.
        layout: of a `TreeBatch`, all but the requests' blocks.
        only_trees: no other request runs in this step.
    """

    requests: torch.Tensor
    layout: dict[str, Any]
    only_trees: bool

    @classmethod
    def place(
        cls,
        step: TreeStep,
        contexts: np.ndarray,
        total_rows: int,
        positions: torch.Tensor,
    ) -> StepTrees:
        """Move tree rows to the positions of their depths, and collect their masks.

        Args:
            step: the trees.
            contexts: [B] KV entries before each request's root.
            total_rows: rows of the step, of prompts too.
            positions: [T] of all rows, in order within each request; changed in place.
        """
        tables = step.tables
        rows, tree_ids, inner = step.tree_rows()
        depths = tables.depths[tree_ids, inner]
        positions[torch.from_numpy(rows)] += torch.from_numpy(depths - inner)
        masks = tables.ancestors[tree_ids, inner]
        only_trees = len(rows) == total_rows
        if not only_trees:
            depths = spread(depths, rows, total_rows)
            masks = spread(masks, rows, total_rows)
        requests = step.tree_requests
        layout = {
            "starts": step.starts[requests],
            "num_rows": step.num_rows[requests],
            "context_lens": contexts[requests],
            "ancestors": masks,
            "depths": depths,
        }
        tensors = {name: torch.from_numpy(array) for name, array in layout.items()}
        return cls(torch.from_numpy(requests), tensors, only_trees)

    def for_stock_kernel(
        self, metadata: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """The step without the trees' contexts: what the stock kernel computes of tree
        rows is written over, and reading contexts would take as long as the trees."""
        seq_lens = metadata.seq_lens.clone()
        seq_lens[self.requests] = self.layout["num_rows"].to(seq_lens.dtype)
        return replace(metadata, seq_lens=seq_lens)

    def attention(self, block_table: torch.Tensor) -> CpuTreeAttention:
        """What attention layers run; `block_table` is of all the step's requests."""
        blocks = block_table[self.requests]
        return CpuTreeAttention(TreeBatch(block_table=blocks, **self.layout))
