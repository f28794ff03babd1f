"""Guesses on the device, the torch reference: draft ids of every request's next tree.

The same as ``vllm_ppd.candidates.fill_drafts``, with every request's drafts in a row
of one tensor.
"""

from __future__ import annotations

import torch

from .tree_tables import TreeTables

__all__ = ["fill_tree_reference", "lay_out_rows"]


def fill_tree_reference(
    tables: TreeTables,
    trees: torch.Tensor,  # int [B]: tree id of each request's next step
    best: torch.Tensor,  # int [B, M, k]: best tokens of each prompt token, best first
    drafts: torch.Tensor,  # int [B, K]: written; K >= 1 rows after the root
    filler: int = 0,
) -> None:
    """Write the rows after the root of each request's tree.

    The candidate at depth ``d`` and rank ``r`` is ``best[b, d - 1, r]``; prompt rows
    get their soft ids. Columns past the tree's end get `filler`, and a tree that is
    longer than K is cut, which leaves a valid smaller one. Rows of `best` at or past
    a request's state are not read; k is at least the largest rank plus one.
    """
    trees = trees.long()
    tokens = torch.zeros_like(tables.parents[trees], dtype=torch.int64)  # [B, N]
    if best.shape[1]:  # a policy may have no prompt tokens at all
        request = torch.arange(len(trees), device=trees.device)[:, None]
        depths = tables.candidate_depths[trees].long()
        ranks = tables.candidate_ranks[trees].long()
        tokens = best[request, (depths - 1).clamp(min=0), ranks].long()
    lay_out_rows(tables, trees, tokens, drafts, filler)


def lay_out_rows(
    tables: TreeTables,
    trees: torch.Tensor,  # int64 [B]
    tokens: torch.Tensor,  # int64 [B, N]: of the candidates; others are not read
    drafts: torch.Tensor,  # int [B, K]: written
    filler: int,
) -> None:
    """Write candidates, prompt rows' soft ids, and `filler` past the tree's end."""
    rows, nodes = tables.soft_ids.shape[1], tables.parents.shape[1]
    count = min(rows - 1, drafts.shape[1])
    ids = tables.soft_ids[trees]  # [B, Q]
    is_candidate = tables.parents[trees] >= 0
    ids[:, :nodes] = torch.where(is_candidate, tokens, ids[:, :nodes])
    row = torch.arange(rows, device=trees.device)
    ids = torch.where(row < tables.num_rows[trees][:, None], ids, filler)
    drafts.fill_(filler)
    drafts[:, :count] = ids[:, 1 : count + 1].to(drafts.dtype)
