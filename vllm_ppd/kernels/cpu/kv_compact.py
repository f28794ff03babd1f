"""KV compaction on CPU: all layers in one call of the compiled kernel.

After verification the keys and values of accepted rows lie scattered over the step's
slots; the next step expects them right after the context. A slot is a linear index
into the cache: block * block_size + offset.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from vllm_ppd.kernels.cpu.build import load_library, struct
from vllm_ppd.kernels.cpu.layout import key_view, value_view

_CacheLayer = struct(  # as in kv_compact.cpp
    ["base"],
    [
        *("num_blocks", "kv_heads", "block_size", "dim"),
        *("item_size", "block_stride", "head_stride"),
    ],
)


class CpuKVCompactor:
    """Moves tokens between slots of the given caches, built once at start.

    Args:
        kv_caches: per layer [num_blocks, kv_heads, block_size, 2 * D] as in `layout`;
            all share one numbering of slots (one KV cache group).

    Attributes:
        views: the caches as `kv_compact_reference` takes them.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        self._caches = list(kv_caches)  # keeps the memory alive
        layers = []
        for cache in self._caches:
            size = cache.element_size()
            if size not in (1, 2, 4):
                raise ValueError(f"cannot compact a KV cache of {cache.dtype}")
            blocks, heads, block_size, width = cache.shape
            block, head = (stride * size for stride in cache.stride()[:2])
            shape = blocks, heads, block_size, width // 2
            layers.append(_CacheLayer(cache.data_ptr(), *shape, size, block, head))
        self._num_slots = min(c.shape[0] * c.shape[2] for c in self._caches)
        self.views = [
            view(cache) for view in (key_view, value_view) for cache in self._caches
        ]
        self._table = (_CacheLayer * len(layers))(*layers)
        self._address = ctypes.addressof(self._table)
        library = load_library()
        self._kernel = None if library is None else library.ppd_kv_compact

    def run(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """As `kv_compact_reference`, in order of i.

        Args:
            src: int64 [n] slots, contiguous
            dst: int64 [n]

        Raises:
            ValueError: arrays of another type or length.
            IndexError: a slot outside the cache; then nothing has moved.
        """
        for slots in (src, dst):
            if slots.dtype != torch.int64 or not slots.is_contiguous():
                raise ValueError(f"slots must be contiguous int64, not {slots.dtype}")
        moves = len(src)
        if len(dst) != moves:
            raise ValueError(f"{moves} sources but {len(dst)} targets")
        if self._kernel is None:
            slots = torch.stack([src, dst])
            outside = ((slots < 0) | (slots >= self._num_slots)).any(0).tolist()
            bad = outside.index(True) + 1 if any(outside) else 0
            if not bad:
                kv_compact_reference(self.views, *slots)
        else:
            pointers = src.data_ptr(), dst.data_ptr()
            bad = self._kernel(self._address, len(self._table), *pointers, moves)
        if bad:
            move = f"{int(src[bad - 1])} -> {int(dst[bad - 1])}"
            raise IndexError(f"move {move} leaves the KV cache")


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
