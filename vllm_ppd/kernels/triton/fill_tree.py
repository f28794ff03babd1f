"""Draft ids of every request's next tree: one program per request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tree_tables import TreeTables

__all__ = ["fill_tree"]


@triton.jit
def _fill_tree_kernel(
    trees_ptr,  # [B]
    best_ptr,  # [B, M, k], any strides
    drafts_ptr,  # [B, K]
    num_rows_ptr,  # [S]
    soft_ids_ptr,  # [S, Q]
    parents_ptr,  # [S, N]
    depths_ptr,  # [S, N]
    ranks_ptr,  # [S, N]
    filler,
    num_drafts,  # K
    row_width,  # Q
    node_width,  # N
    best_stride_request,
    best_stride_depth,
    best_stride_rank,
    drafts_stride,
    BLOCK: tl.constexpr,  # power of two, at least K
):
    request = tl.program_id(0).to(tl.int64)
    tree = tl.load(trees_ptr + request)
    column = tl.arange(0, BLOCK)
    row = column + 1
    in_tree = row < tl.minimum(tl.load(num_rows_ptr + tree), row_width)
    is_node = row < node_width
    at = tree * node_width + row
    parents = tl.load(parents_ptr + at, mask=is_node, other=-1)
    candidate = in_tree & (parents >= 0)
    depths = tl.load(depths_ptr + at, mask=candidate, other=1)
    ranks = tl.load(ranks_ptr + at, mask=candidate, other=0)
    guesses = tl.load(
        best_ptr
        + request * best_stride_request
        + (depths - 1) * best_stride_depth
        + ranks * best_stride_rank,
        mask=candidate,
        other=0,
    )
    soft = tl.load(soft_ids_ptr + tree * row_width + row, mask=in_tree, other=filler)
    drafts = tl.where(candidate, guesses.to(tl.int64), soft)
    tl.store(
        drafts_ptr + request * drafts_stride + column, drafts, mask=column < num_drafts
    )


def fill_tree(
    tables: TreeTables,
    trees: torch.Tensor,
    best: torch.Tensor,
    drafts: torch.Tensor,
    filler: int = 0,
) -> None:
    """As :func:`vllm_ppd.kernels.fill_tree.fill_tree_reference`."""
    batch, num_drafts = drafts.shape
    if batch == 0:
        return
    _fill_tree_kernel[(batch,)](
        trees,
        best,
        drafts,
        tables.num_rows,
        tables.soft_ids,
        tables.parents,
        tables.candidate_depths,
        tables.candidate_ranks,
        filler,
        num_drafts,
        tables.soft_ids.shape[1],
        tables.parents.shape[1],
        *best.stride(),
        drafts.stride(0),
        BLOCK=triton.next_power_of_2(num_drafts),
        num_warps=1,
    )
