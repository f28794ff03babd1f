"""Tree attention split over the context: the tiles of a split, and the second kernel.

Every split leaves, per row and head, its sum of values, the largest score and the sum
of weights relative to it; the second kernel joins them (flash decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below this many tiles per split the second kernel costs more than the split saves.
_MIN_TILES = tl.constexpr(2)


@triton.jit
def split_range(context, num_rows, WINDOW: tl.constexpr, TILE, SPLITS: tl.constexpr):
    """First slot that any row sees, first tile, end of tiles, tiles per split."""
    first = context * 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW + 1, 0)
    begin = first // TILE
    end = (context + num_rows + TILE - 1) // TILE
    per_split = tl.maximum((end - begin + SPLITS - 1) // SPLITS, _MIN_TILES)
    return first, begin, end, per_split


@triton.jit(do_not_specialize=["max_rows", "row_tiles"])
def join_splits_kernel(
    partial_ptr,  # float32 [B * max_rows, H, SPLITS, D]
    tops_ptr,  # float32 [B * max_rows, H, SPLITS]
    totals_ptr,
    output_ptr,  # [T, H, HEAD_SIZE]
    starts_ptr,  # [B]
    num_rows_ptr,  # [B]
    context_lens_ptr,  # [B]
    max_rows,
    row_tiles,
    output_stride_token,
    output_stride_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    request = tl.program_id(0) // row_tiles
    row_tile = tl.program_id(0) % row_tiles
    kv_head = tl.program_id(1)
    num_rows = tl.load(num_rows_ptr + request)
    if row_tile * M >= num_rows * GROUP:
        return
    context = tl.load(context_lens_ptr + request)
    _, begin, end, per_split = split_range(context, num_rows, WINDOW, TILE, SPLITS)
    num_splits = (end - begin + per_split - 1) // per_split
    member = row_tile * M + tl.arange(0, M)
    row = member // GROUP
    head = kv_head * GROUP + member % GROUP
    in_tree = row < num_rows
    heads = tl.num_programs(1) * GROUP
    at = ((request * max_rows + row).to(tl.int64) * heads + head) * SPLITS
    split = tl.arange(0, SPLITS)
    written = in_tree[:, None] & (split < num_splits)[None, :]
    tops = tl.load(tops_ptr + at[:, None] + split, mask=written, other=float("-inf"))
    totals = tl.load(totals_ptr + at[:, None] + split, mask=written, other=0.0)
    highest = tl.max(tops, axis=1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(totals * tl.exp2(tops - highest[:, None]), axis=1)
    total = tl.where(total == 0.0, 1.0, total)

    dims = tl.arange(0, D)
    in_head = dims < HEAD_SIZE
    result = tl.zeros([M, D], dtype=tl.float32)
    # Unrolled, so that all loads are under way together.
    for index in tl.static_range(SPLITS):
        written = row < tl.where(num_splits > index, num_rows, 0)
        top = tl.load(tops_ptr + at + index, mask=written, other=float("-inf"))
        partial = tl.load(
            partial_ptr + (at + index)[:, None] * D + dims[None, :],
            mask=written[:, None] & in_head[None, :],
            other=0.0,
        )
        result += partial * tl.exp2(top - highest)[:, None]
    result /= total[:, None]
    start = tl.load(starts_ptr + request).to(tl.int64)
    output_at = (start + row) * output_stride_token + head * output_stride_head
    result = result.to(output_ptr.dtype.element_ty)
    mask = in_tree[:, None] & in_head[None, :]
    tl.store(output_ptr + output_at[:, None] + dims[None, :], result, mask=mask)
