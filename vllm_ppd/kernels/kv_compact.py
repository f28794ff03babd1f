"""KV compaction, the torch references: move the accepted path next to the context.

After verification the accepted rows' keys and values lie scattered over the step's
slots; the next step expects them right after the context. A slot is a linear index
into the cache: block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["compact_paths_reference", "kv_compact_reference"]


def kv_compact_reference(
    key_caches: Sequence[torch.Tensor],
    value_caches: Sequence[torch.Tensor],
    src: torch.Tensor,
    dst: torch.Tensor,
) -> None:
    """Copy slot src[i] to dst[i], in order of i, in every layer and KV head.

    Args:
        key_caches: per layer [num_blocks, kv_heads, block_size, D], any strides
        value_caches: likewise
        src: int64 [n], slots to read
        dst: int64 [n], slots to write

    Along one request callers pass ascending dst with src >= dst, so no move reads
    what an earlier one wrote, and a parallel version may do the moves in any order
    per element as long as each element sees them ascending.
    """
    moves = list(zip(src.tolist(), dst.tolist(), strict=True))
    for cache in (*key_caches, *value_caches):
        block_size = cache.shape[2]
        slots = cache.shape[0] * block_size
        for a, b in moves:
            if not (0 <= a < slots and 0 <= b < slots):
                raise IndexError(f"move {a} -> {b} leaves a cache of {slots} slots")
        for a, b in moves:
            source = cache[a // block_size, :, a % block_size]
            cache[b // block_size, :, b % block_size] = source


def compact_paths_reference(
    caches: Sequence[torch.Tensor],  # each [num_blocks, kv_heads, block_size, width]
    slots: torch.Tensor,  # int64 [T]: cache slot of every row of the step
    starts: torch.Tensor,  # int [B]: row of each root
    paths: torch.Tensor,  # int [B, D + 1]: accepted rows of each tree, the root first
    lengths: torch.Tensor,  # int [B]: how many of them; 0 for a padded request
) -> None:
    """Copy the slot of accepted row ``paths[b, d]`` to that of row ``d``; d ascending.

    `caches` may have any strides and element types; keys and values can be two caches
    or one. All share one numbering of slots. Nothing is read on the host.
    ``paths[b, d] >= d`` and rises with d, so a slot is never read after it was
    written.
    """
    starts, real = starts.long(), lengths > 0
    # What does not move copies a root to itself: a root's slot is never a target. Row
    # 0 stands in for padded requests, whose start may be anywhere.
    roots = torch.where(real, starts, 0)
    for depth in range(1, paths.shape[1]):
        path = paths[:, depth].long()
        moves = (depth < lengths) & (path != depth)
        source = slots[torch.where(moves, starts + path, roots)]
        target = slots[torch.where(moves, starts + depth, roots)]
        for cache in caches:
            size = cache.shape[2]
            rows = cache[source // size, :, source % size]
            cache[target // size, :, target % size] = rows
