"""The first kernel of tree attention in Triton: one KV head, tile of rows and split.

All query heads of the KV head's group form one tile: member ``m`` of a tile is row
``m // GROUP`` of the tree and head ``m % GROUP`` of the group. Context slots that every
row sees need no mask and are most of the work; the tree's own slots, the end of the
context and the start of a sliding window go through a second, masked loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_ppd.kernels.triton.splits import split_range


@triton.jit
def _mask_bits(ancestors_ptr, row, first, num_rows, WORDS: tl.constexpr):
    """[M] 64 bits: which of the slots after `first`, counted from the root, rows see.

    A row's words are taken to go on to the left with ones, the context.
    """
    first = tl.maximum(first, -64) + 64  # from where it is all context
    word = first // 64 - 1
    shift = (first % 64).to(tl.uint64)
    bits_ptr = ancestors_ptr + row * WORDS + word
    low_rows = tl.where((word >= 0) & (word < WORDS), num_rows, 0)
    high_rows = tl.where(word + 1 < WORDS, num_rows, 0)
    low = tl.load(bits_ptr, mask=row < low_rows, other=0)
    low = tl.where(word < 0, -1, low).to(tl.uint64, bitcast=True)
    high = tl.load(bits_ptr + 1, mask=row < high_rows, other=0)
    high = high.to(tl.uint64, bitcast=True)
    # Two steps, because a shift by 64 is not defined.
    return (low >> shift) | ((high << 1) << (63 - shift))


@triton.jit
def _attend_tile(
    acc,  # float32 [M, D]
    top,  # float32 [M], largest score so far
    total,  # float32 [M], sum of weights so far
    query,  # [M, D]
    tile,  # which TILE slots
    dims,  # [D]: 0, 1, ...
    row,  # [M] row of the tree
    depth,  # [M]
    keys,  # address at the KV head; strides of block, slot and element
    values,
    table_ptr,  # at the request
    tree,  # addresses of masks and depths, at the request
    bounds,  # first slot that any row sees, context, rows
    score_scale,
    softcap,
    TILE: tl.constexpr,
    D: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    key_ptr, key_stride_block, key_stride_slot, key_stride_element = keys
    value_ptr, value_stride_block, value_stride_slot, value_stride_element = values
    ancestors_ptr, depths_ptr = tree
    first, context, num_rows = bounds
    slot = tile * TILE + tl.arange(0, TILE)
    in_range = (slot >= first) & (slot < context + num_rows)
    if MASKED:
        blocks = tl.load(table_ptr + slot // BLOCK_SIZE, mask=in_range, other=0)
    else:
        blocks = tl.load(table_ptr + slot // BLOCK_SIZE)
    blocks = blocks.to(tl.int64)
    offsets = (slot % BLOCK_SIZE).to(tl.int64)
    key_at = blocks * key_stride_block + offsets * key_stride_slot
    value_at = blocks * value_stride_block + offsets * value_stride_slot
    key_ptr += key_at[None, :] + dims[:, None] * key_stride_element
    value_ptr += value_at[:, None] + dims[None, :] * value_stride_element
    in_head = dims < HEAD_SIZE
    if MASKED:
        # Nothing outside the range is read: there may be anything, and 0 * nan is nan.
        key_mask = in_head[:, None] & in_range[None, :]
        keys = tl.load(key_ptr, mask=key_mask, other=0.0)
        value_mask = in_range[:, None] & in_head[None, :]
        values = tl.load(value_ptr, mask=value_mask, other=0.0)
    elif HEAD_SIZE == D:
        keys = tl.load(key_ptr)
        values = tl.load(value_ptr)
    else:
        keys = tl.load(key_ptr, mask=in_head[:, None], other=0.0)
        values = tl.load(value_ptr, mask=in_head[None, :], other=0.0)

    # Scores in units of log 2.
    keys = keys.to(query.dtype)
    scores = tl.dot(query, keys, input_precision="ieee") * score_scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), which neither overflows nor yields nan.
        scores = softcap * (1 - 2 / (1 + tl.exp2(scores)))
    if MASKED:
        tl.static_assert(TILE <= 128, "two words of mask bits per tile at most")
        offset = tile * TILE - context
        bits = _mask_bits(ancestors_ptr, row, offset, num_rows, WORDS)[:, None]
        index = tl.arange(0, TILE)
        if TILE > 64:
            more = _mask_bits(ancestors_ptr, row, offset + 64, num_rows, WORDS)
            bits = tl.where((index < 64)[None, :], bits, more[:, None])
        seen = (bits >> (index % 64)[None, :].to(tl.uint64)) & 1
        seen = (seen != 0) & in_range[None, :]
        if WINDOW > 0:
            # Rows of one depth share a position, whatever their slots.
            inner = slot - context
            key_depth = tl.load(
                depths_ptr + inner, mask=in_range & (inner >= 0), other=0
            )
            key_depth = tl.where(inner < 0, inner, key_depth)
            seen = seen & (key_depth[None, :] > depth[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))

    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = new_top
    if MASKED:  # a row that has seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    values = values.to(query.dtype)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(query.dtype), values, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=["max_rows", "row_tiles"])
def attend_kernel(
    query_ptr,  # [T, H, HEAD_SIZE]
    key_ptr,  # [num_blocks, KV heads, BLOCK_SIZE, HEAD_SIZE], any strides
    value_ptr,
    output_ptr,  # [T, H, HEAD_SIZE]
    partial_ptr,  # float32 [B * max_rows, H, SPLITS, D], if SPLITS > 1
    tops_ptr,  # float32 [B * max_rows, H, SPLITS]
    totals_ptr,
    table_ptr,  # int32 [B, max_blocks]
    starts_ptr,  # [B]
    num_rows_ptr,  # [B]
    context_lens_ptr,  # [B]
    ancestors_ptr,  # int64 [T, WORDS]
    depths_ptr,  # [T]
    scale,  # softmax scale * log2(e), or 2 * that / softcap
    softcap,  # softcap * log2(e)
    max_rows,
    row_tiles,
    table_stride,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    key_stride_element,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    value_stride_element,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # slots per cache block
    WORDS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,  # power of two, at least HEAD_SIZE
    WIDE: tl.constexpr,  # products in float32
):
    request = tl.program_id(0) // row_tiles
    row_tile = tl.program_id(0) % row_tiles
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_rows = tl.load(num_rows_ptr + request)
    if row_tile * M >= num_rows * GROUP:
        return  # padded, or no tree
    context = tl.load(context_lens_ptr + request)
    first, begin, end, per_split = split_range(context, num_rows, WINDOW, TILE, SPLITS)
    begin += split * per_split
    end = tl.minimum(end, begin + per_split)
    if begin >= end:
        return

    start = tl.load(starts_ptr + request).to(tl.int64)
    member = row_tile * M + tl.arange(0, M)
    row = member // GROUP
    head = kv_head * GROUP + member % GROUP
    dims = tl.arange(0, D)
    in_tree = row < num_rows
    mask = in_tree[:, None] & (dims < HEAD_SIZE)[None, :]
    query_at = (start + row) * query_stride_token + head * query_stride_head
    query = tl.load(query_ptr + query_at[:, None] + dims[None, :], mask=mask, other=0.0)
    query = query.to(tl.float32 if WIDE else output_ptr.dtype.element_ty)
    depth = tl.load(depths_ptr + start + row, mask=in_tree, other=0)

    key_ptr += kv_head.to(tl.int64) * key_stride_head
    value_ptr += kv_head.to(tl.int64) * value_stride_head
    keys = (key_ptr, key_stride_block, key_stride_slot, key_stride_element)
    values = (value_ptr, value_stride_block, value_stride_slot, value_stride_element)
    table_ptr += request.to(tl.int64) * table_stride
    tree = (ancestors_ptr + start * WORDS, depths_ptr + start)
    bounds = (first, context, num_rows)
    acc = tl.zeros([M, D], dtype=tl.float32)
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)

    # [begin, open_begin) and [open_end, end) need masks.
    open_begin = begin
    if WINDOW > 0:
        deepest = context + tl.max(depth)
        inside = (tl.maximum(deepest - WINDOW + 1, 0) + TILE - 1) // TILE
        open_begin = tl.minimum(tl.maximum(inside, begin), end)
    open_end = tl.minimum(tl.maximum(context // TILE, open_begin), end)
    for tile in range(open_begin, open_end):
        acc, top, total = _attend_tile(
            acc, top, total, query, tile, dims, row, depth,
            keys, values, table_ptr, tree, bounds, scale, softcap,
            TILE, D, HEAD_SIZE, BLOCK_SIZE, WORDS, SOFTCAP, WINDOW, MASKED=False,
        )  # fmt: skip
    num_before = open_begin - begin
    for index in tl.range(0, num_before + end - open_end, num_stages=1):
        behind = open_end - num_before + index
        tile = tl.where(index < num_before, begin + index, behind)
        acc, top, total = _attend_tile(
            acc, top, total, query, tile, dims, row, depth,
            keys, values, table_ptr, tree, bounds, scale, softcap,
            TILE, D, HEAD_SIZE, BLOCK_SIZE, WORDS, SOFTCAP, WINDOW, MASKED=True,
        )  # fmt: skip

    if SPLITS == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        output_at = (start + row) * output_stride_token + head * output_stride_head
        result = result.to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + output_at[:, None] + dims[None, :], result, mask=mask)
    else:
        heads = tl.num_programs(1) * GROUP
        at = ((request * max_rows + row).to(tl.int64) * heads + head) * SPLITS + split
        tl.store(partial_ptr + at[:, None] * D + dims[None, :], acc, mask=mask)
        tl.store(tops_ptr + at, top, mask=in_tree)
        tl.store(totals_ptr + at, total, mask=in_tree)
