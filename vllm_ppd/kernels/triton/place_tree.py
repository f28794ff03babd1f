"""A step's trees in the persistent buffers, in Triton: one program per request.

vLLM lays the rows of a request out as a sequence. For requests with a tree this
writes the positions, masks and depths that the model and its attention read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ppd.kernels.device_tables import DeviceTables


@triton.jit
def _place_tree_kernel(
    trees_ptr,  # [B]
    num_rows_ptr,  # [B]
    query_starts_ptr,  # [B + 1]
    seq_lens_ptr,  # [B]
    table_depths_ptr,  # [S, Q]
    table_ancestors_ptr,  # [S, Q, WORDS]
    positions_ptr,  # [T]
    ancestors_ptr,  # [T, WORDS]
    depths_ptr,  # [T]
    starts_ptr,  # [B]
    context_lens_ptr,  # [B]
    row_width,  # Q
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least Q
):
    request = tl.program_id(0)
    tree = tl.load(trees_ptr + request)
    num_rows = tl.load(num_rows_ptr + request)
    start = tl.load(query_starts_ptr + request + 1) - num_rows
    seq_len = tl.load(seq_lens_ptr + request)
    tl.store(starts_ptr + request, start)
    context = tl.where(num_rows > 0, seq_len - num_rows, 0)
    tl.store(context_lens_ptr + request, context)
    if num_rows > 0:
        root = tl.load(positions_ptr + start)
        row = tl.arange(0, BLOCK)
        mask = row < num_rows
        at = tree * row_width + row
        depths = tl.load(table_depths_ptr + at, mask=mask, other=0)
        # The root's own position is stored again as it was: its depth is 0.
        tl.store(positions_ptr + start + row, root + depths, mask=mask)
        tl.store(depths_ptr + start + row, depths, mask=mask)
        for word in tl.static_range(WORDS):
            bits = tl.load(table_ancestors_ptr + at * WORDS + word, mask=mask, other=0)
            tl.store(ancestors_ptr + (start + row) * WORDS + word, bits, mask=mask)


def place_tree(
    tables: DeviceTables,
    trees: torch.Tensor,  # int [B]: tree id of each request
    num_rows: torch.Tensor,  # int [B]: tree rows; 0: no tree, or a padded request
    query_starts: torch.Tensor,  # int [B + 1]: first row of each request, and the end
    seq_lens: torch.Tensor,  # int [B]: cached tokens and this step's rows
    positions: torch.Tensor,  # int [>= T]: changed at tree rows
    ancestors: torch.Tensor,  # int64 [T, W]: written at tree rows
    depths: torch.Tensor,  # int32 [T]: written at tree rows
    starts: torch.Tensor,  # int32 [B]: written, row of each root
    context_lens: torch.Tensor,  # int32 [B]: written, cached tokens before the root
) -> None:
    """Write what `TreeBatch` needs, and each tree row's position; all contiguous.

    A tree is the last ``num_rows`` rows of its request. The root's position is right
    already, and the others follow from it. `num_rows` must not exceed the tables'
    rows; rows past the tree's end see the root and themselves.
    """
    rows, words = tables.ancestors.shape[1:]
    if len(trees) == 0:
        return
    _place_tree_kernel[(len(trees),)](
        *(trees, num_rows, query_starts, seq_lens, tables.depths, tables.ancestors),
        *(positions, ancestors, depths, starts, context_lens, rows),
        WORDS=words,
        BLOCK=triton.next_power_of_2(rows),
        num_warps=1,
    )
