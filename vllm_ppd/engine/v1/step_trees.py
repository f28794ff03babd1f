"""One step's trees on V1, as the attention layers see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_ppd.trees.layout import TreeStep, spread


@dataclass(frozen=True)
class StepTrees:
    """The trees of one step. R tree requests, T rows of the whole step, W mask words.

    Attributes:
        requests: [R] index of each tree request in the batch.
        starts: [R] row of each root.
        num_rows: [R] rows of each tree, root included.
        context_lens: [R] KV entries before the root.
        ancestors: [T, W] int64 masks of visible in-tree rows.
        depths: [T] row position minus root position.
        only_trees: no other request runs in this step.
    """

    requests: torch.Tensor
    starts: torch.Tensor
    num_rows: torch.Tensor
    context_lens: torch.Tensor
    ancestors: torch.Tensor
    depths: torch.Tensor
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
        return cls(
            requests=torch.from_numpy(requests),
            starts=torch.from_numpy(step.starts[requests]),
            num_rows=torch.from_numpy(step.num_rows[requests]),
            context_lens=torch.from_numpy(contexts[requests]),
            ancestors=torch.from_numpy(masks),
            depths=torch.from_numpy(depths),
            only_trees=only_trees,
        )
