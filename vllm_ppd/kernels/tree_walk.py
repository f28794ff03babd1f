"""Verification on the device: the accepted path of every tree, the torch reference.

The walk is that of `vllm_ppd.trees.verify.TreeWalk`. Here the target's token after
*every* node is known beforehand: vLLM draws its noise from (seed, position), so one
sampler call serves all nodes. Nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_ppd.kernels.device_tables import DeviceTables

__all__ = ["Walk", "tree_walk_reference"]


class Walk(NamedTuple):
    """The verified step. B requests, D the tables' depth, P = prompt tokens * EPTs."""

    tokens: torch.Tensor  # int64 [B, D + 1]: emitted tokens, -1 padded
    num_sampled: torch.Tensor  # int32 [B]: emitted tokens; 0 for a padded request
    end_nodes: torch.Tensor  # int32 [B]: node where the walk ended
    paths: torch.Tensor  # int32 [B, D + 1]: visited nodes, root first, 0 padded
    num_prompted: torch.Tensor  # int32 [B]: complete prompt tokens on the end node
    # int32 [B, P]: rows of the step that are the end node's prompt rows (prompt token
    # major); the root's row from num_prompted * EPTs on.
    prompt_rows: torch.Tensor


def tree_walk_reference(
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
    whose ensemble was cut off.
    """
    trees, starts, num_rows = trees.long(), starts.long(), num_rows.long()
    batch, depth = len(trees), tables.max_depth
    parents = tables.parents[trees]  # [B, N]
    node = torch.arange(parents.shape[1], device=trees.device)
    num_nodes = torch.minimum(num_rows, tables.num_nodes[trees])
    is_draft = (node > 0) & (node < num_nodes[:, None])
    node_tokens = input_ids[torch.where(is_draft, starts[:, None] + node, 0)]

    tokens = sampled.new_full((batch, depth + 1), -1, dtype=torch.int64)
    paths = trees.new_zeros((batch, depth + 1))
    active = num_rows > 0
    nodes, lengths = torch.zeros_like(trees), torch.zeros_like(trees)
    for level in range(depth + 1):
        picked = sampled[torch.where(active, sampled_starts + nodes, 0)].long()
        tokens[:, level] = torch.where(active, picked, -1)
        paths[:, level] = torch.where(active, nodes, 0)
        lengths += active
        accepted = is_draft & (parents == nodes[:, None])
        accepted &= node_tokens == picked[:, None]
        # Node 0 is never a child, so 0 means that no child carries the token.
        child = accepted.int().argmax(dim=1)
        active = active & (child > 0)
        nodes = torch.where(active, child, nodes)

    firsts = tables.first_prompt_rows[trees, nodes]
    complete = (num_rows - firsts).div(tables.num_ept, rounding_mode="floor")
    num_prompted = complete.clamp(min=0).minimum(tables.prompts[trees, nodes])
    index = torch.arange(tables.num_prompt_tokens * tables.num_ept, device=trees.device)
    inside = index < (num_prompted * tables.num_ept)[:, None]
    roots = torch.where(num_rows > 0, starts, 0)[:, None]
    prompt_rows = roots + torch.where(inside, firsts[:, None] + index, 0)
    results = (lengths, nodes, paths, num_prompted, prompt_rows)
    return Walk(tokens, *(result.int() for result in results))
