"""KV compaction: move the accepted path's rows next to the context, in torch.

After verification the keys and values of accepted rows lie scattered over the step's
slots; the next step expects them right after the context. A slot is a linear index
into the cache: block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["kv_compact_reference"]


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
