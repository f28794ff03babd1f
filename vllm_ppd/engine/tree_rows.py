"""Where a step's tree rows go: their positions, and what its attention must know."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_ppd.engine import step_context
from vllm_ppd.step import TreeStep, spread

__all__ = ["place_trees"]


def place_trees(
    runner: Any,
    step: TreeStep,
    contexts: np.ndarray,
    padded: list[int],
    total_rows: int,
) -> None:
    """Positions, soft ids of padded requests, and masks of the tree rows.

    Args:
        runner: a V1 model runner that has prepared the step's inputs.
        step: the trees.
        contexts: [B] KV entries before each request's root.
        padded: requests whose rows vLLM scheduled in advance.
        total_rows: rows of the step, of prompts too.
    """
    tables, to_device = runner.drafter.tables, runner.to_device
    for index in padded:
        start, count = step.starts[index], step.num_rows[index]
        ids = tables.soft_ids[step.states[index], :count]
        target = runner.input_ids.gpu
        rows = to_device(np.arange(start + 1, start + count))
        target[rows] = to_device(ids[1:]).to(target.dtype)
    moved = runner.positions
    if len(step.states) == 1:
        # One request decoding alone is where every microsecond shows.
        start, count = int(step.starts[0]), int(step.num_rows[0])
        rows = np.arange(start, start + count)
        depths, shifts, masks = tables.layout(int(step.states[0]), count)
        moved[start : start + count] += to_device(shifts)
    else:
        rows, states, inner = step.tree_rows()
        depths = tables.depths[states, inner]
        moved[to_device(rows)] += to_device(depths - inner)
        masks = tables.ancestors[states, inner]
    only_trees = len(rows) == total_rows
    if not only_trees:
        depths = spread(depths, rows, total_rows)
        masks = spread(masks, rows, total_rows)
    trees = step.trees
    step_context.set_current(
        step_context.StepContext(
            requests=to_device(trees),
            starts=torch.from_numpy(step.starts[trees]),
            num_rows=torch.from_numpy(step.num_rows[trees]),
            context_lens=torch.from_numpy(contexts[trees]),
            ancestors=to_device(masks),
            depths=to_device(depths),
            only_trees=only_trees,
        )
    )
