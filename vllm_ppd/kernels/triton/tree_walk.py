"""Verification in Triton: one program walks the tree of one request.

The walk is that of `vllm_ppd.trees.verify.TreeWalk`. Here the target's token after
*every* node is known beforehand: vLLM draws its noise from (seed, position), so one
sampler call serves all nodes. Nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_ppd.kernels.device_tables import DeviceTables


class Walk(NamedTuple):
    """The verified step. B requests, D the tables' depth, P = prompt tokens * EPTs."""

    tokens: torch.Tensor  # int64 [B, D + 1]: emitted tokens, -1 padded
    num_sampled: torch.Tensor  # int32 [B]: emitted tokens; 0 for a padded request
    paths: torch.Tensor  # int32 [B, D + 1]: visited nodes, root first, 0 padded
    num_prompted: torch.Tensor  # int32 [B]: complete prompt tokens on the end node
    # int32 [B, P]: rows of the step that are the end node's prompt rows (prompt token
    # major); the root's row from num_prompted * EPTs on.
    prompt_rows: torch.Tensor


@triton.jit
def _tree_walk_kernel(
    trees_ptr,  # [B]
    starts_ptr,  # [B]
    num_rows_ptr,  # [B]
    input_ids_ptr,  # [T]
    sampled_ptr,  # [L]
    sampled_starts_ptr,  # [B]
    num_nodes_ptr,  # [S]
    parents_ptr,  # [S, N]
    prompts_ptr,  # [S, N]
    first_prompt_rows_ptr,  # [S, N]
    tokens_ptr,  # [B, DEPTH + 1]
    num_sampled_ptr,  # [B]
    paths_ptr,  # [B, DEPTH + 1]
    num_prompted_ptr,  # [B]
    prompt_rows_ptr,  # [B, P]
    table_width,  # N
    prompt_width,  # P
    num_ept,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two, at least N
    BLOCK_P: tl.constexpr,  # power of two, at least P
):
    request = tl.program_id(0)
    tree = tl.load(trees_ptr + request)
    start = tl.load(starts_ptr + request)
    num_rows = tl.load(num_rows_ptr + request)
    sampled_start = tl.load(sampled_starts_ptr + request)
    num_nodes = tl.minimum(tl.load(num_nodes_ptr + tree), num_rows)

    # The whole tree fits in registers, so a level costs two reductions and no load.
    node = tl.arange(0, BLOCK_N)
    scheduled = node < num_nodes
    is_draft = (node > 0) & scheduled
    table = tree * table_width
    parents = tl.load(parents_ptr + table + node, mask=is_draft, other=-1)
    tokens = tl.load(input_ids_ptr + start + node, mask=is_draft, other=-1)
    targets = tl.load(sampled_ptr + sampled_start + node, mask=scheduled, other=-1)
    tokens = tokens.to(tl.int64)
    targets = targets.to(tl.int64)

    out = request * (DEPTH + 1)
    current = request * 0  # a tensor, so that its type stays the same below
    length = current
    active = num_rows > 0
    for level in range(DEPTH + 1):
        picked = tl.sum(tl.where(node == current, targets, 0))
        tl.store(tokens_ptr + out + level, tl.where(active, picked, -1))
        tl.store(paths_ptr + out + level, tl.where(active, current, 0))
        length += active.to(tl.int32)
        accepted = is_draft & (parents == current) & (tokens == picked)
        child = tl.min(tl.where(accepted, node, BLOCK_N))
        active = active & (child < BLOCK_N)
        current = tl.where(active, child, current)

    first = tl.load(first_prompt_rows_ptr + table + current)
    prompts = tl.load(prompts_ptr + table + current)
    # At least 0 first: division rounds towards zero.
    prompted = tl.minimum(tl.maximum(num_rows - first, 0) // num_ept, prompts)
    tl.store(num_sampled_ptr + request, length)
    tl.store(num_prompted_ptr + request, prompted)
    index = tl.arange(0, BLOCK_P)
    root = tl.where(num_rows > 0, start, 0)
    rows = root + tl.where(index < prompted * num_ept, first + index, 0)
    at = prompt_rows_ptr + request * prompt_width + index
    tl.store(at, rows, mask=index < prompt_width)


def tree_walk(
    tables: DeviceTables,
    trees: torch.Tensor,  # int [B]: tree id of each request
    starts: torch.Tensor,  # int [B]: row of each root among the step's rows
    num_rows: torch.Tensor,  # int [B]: scheduled tree rows; 0 for a padded request
    input_ids: torch.Tensor,  # int [T]: token of every row of the step
    sampled: torch.Tensor,  # int [L]: the target's token after each row with logits
    sampled_starts: torch.Tensor,  # int [B]: each root's index in `sampled`
) -> Walk:
    """Walk all trees; node ``i`` is entry ``i`` after its root's in `sampled`.

    A request without draft rows (prefill, plain decoding) has ``num_rows`` 1. Rows
    past the tree's end, which vLLM may schedule, are ignored, and so is a prompt token
    whose ensemble was cut off. Inputs are contiguous.
    """
    batch, depth = len(trees), tables.max_depth + 1
    prompt_width = tables.num_prompt_tokens * tables.num_ept
    # Two allocations for five results: an allocation costs about as much as the walk.
    tokens = sampled.new_empty((batch, depth), dtype=torch.int64)
    sizes = [batch, batch * depth, batch, batch * prompt_width]
    flat = sampled.new_empty(sum(sizes), dtype=torch.int32)
    num_sampled, paths, num_prompted, prompt_rows = flat.split(sizes)
    paths, prompt_rows = paths.view(batch, depth), prompt_rows.view(batch, prompt_width)
    walk = Walk(tokens, num_sampled, paths, num_prompted, prompt_rows)
    if batch:
        _tree_walk_kernel[(batch,)](
            *(trees, starts, num_rows, input_ids, sampled, sampled_starts),
            *(tables.num_nodes, tables.parents),
            *(tables.prompts, tables.first_prompt_rows),
            *walk,
            *(tables.parents.shape[1], prompt_width, tables.num_ept),
            DEPTH=tables.max_depth,
            BLOCK_N=triton.next_power_of_2(tables.parents.shape[1]),
            BLOCK_P=triton.next_power_of_2(max(1, prompt_width)),
            num_warps=1,
        )
    return walk
