"""KV compaction: move the accepted path's rows next to the context, in torch.

After verification the keys and values of accepted rows lie scattered over the step's
slots; the next step expects them right after the context. A slot is a linear index
into the cache: block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["compact_paths_reference", "kv_compact_reference"]


def kv_compact_reference(
    caches: Sequence[torch.Tensor],  # each [num_blocks, kv_heads, block_size, width]
    src: torch.Tensor,  # int64 [n]: slots to read
    dst: torch.Tensor,  # int64 [n]: slots to write
) -> None:
    """Copy slot src[i] to dst[i] in every cache and KV head.

    Keys and values can be two caches or one, of any strides and element types; all
    share one numbering of slots. Along one request dst rises and src >= dst, so no
    move reads what an earlier one wrote: the order of the moves does not matter as
    long as every element is read before it is written.
    """
    for cache in caches:
        size = cache.shape[2]
        rows = cache[src // size, :, src % size]
        cache[dst // size, :, dst % size] = rows


def compact_paths_reference(
    caches: Sequence[torch.Tensor],  # as above
    slots: torch.Tensor,  # int64 [T]: cache slot of every row of the step
    starts: torch.Tensor,  # int [B]: row of each root
    paths: torch.Tensor,  # int [B, D + 1]: accepted rows of each tree, the root first
    lengths: torch.Tensor,  # int [B]: number of accepted rows; 0 for a padded request
) -> None:
    """Copy the slot of accepted row ``paths[b, d]`` to that of row ``d``.

    ``paths[b, d] >= d`` and rises with d. Nothing is read on the host.
    """
    depth = torch.arange(paths.shape[1], device=paths.device)
    moves = (depth < lengths[:, None]) & (paths != depth)
    # Other entries copy a root to itself: a root's slot is never a target. Row 0
    # stands in for padded requests, whose start may be anywhere.
    roots = torch.where(lengths > 0, starts.long(), 0)[:, None]
    source = torch.where(moves, roots + paths, roots)
    target = torch.where(moves, roots + depth, roots)
    kv_compact_reference(caches, slots[source.flatten()], slots[target.flatten()])
