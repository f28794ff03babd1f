"""A step's tree rows on V1: whose they are, their positions and their attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_ppd.engine.v1 import step_context
from vllm_ppd.trees.step import TreeStep, spread

__all__ = ["lay_out_trees", "place_trees"]


def lay_out_trees(
    runner: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray
) -> tuple[TreeStep, np.ndarray, list[int]]:
    """The step's trees, [B] KV entries before each request's root, and the requests
    whose rows vLLM padded in advance.

    Args:
        runner: a V1 model runner; arguments of its ``_prepare_inputs``.
    """
    drafts_of = scheduler_output.scheduled_spec_decode_tokens
    request_ids = runner.input_batch.req_ids
    batch = len(request_ids)
    trees = np.zeros(batch, dtype=np.int64)
    num_rows = np.ones(batch, dtype=np.int64)
    padded = []
    for index, request_id in enumerate(request_ids):
        drafts = drafts_of.get(request_id)
        if not drafts:
            continue
        num_rows[index] += len(drafts)
        if drafts[0] >= 0:
            trees[index] = runner.ppd_trees[request_id]
        elif request_id not in runner.ppd_opted_out:
            # A first decode step, padded to a uniform size before we could propose: it
            # runs state 0's tree, as far as that has no candidates.
            trees[index] = runner.drafter.padded_tree(batch)
            padded.append(index)
    ends = np.cumsum(num_scheduled_tokens, dtype=np.int64)
    computed = runner.input_batch.num_computed_tokens_cpu[:batch]
    contexts = computed + num_scheduled_tokens - num_rows
    step = TreeStep(runner.drafter.tables, trees, ends - num_rows, num_rows)
    if (num_rows == num_scheduled_tokens).all():
        # Nobody reads a prompt: a plain decode is a tree of one row, and the stock
        # attention kernel has nothing to do.
        step.trees = np.arange(batch)
    return step, contexts, padded


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
        step, contexts, padded: of `lay_out_trees`.
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
