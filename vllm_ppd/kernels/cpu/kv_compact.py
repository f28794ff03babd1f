"""KV compaction on CPU: all layers in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from vllm_ppd.kernels.cpu.build import load_library, struct
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.kv_compact import kv_compact_reference

__all__ = ["CpuKVCompactor"]

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
        self._views = [
            view(cache) for view in (key_view, value_view) for cache in self._caches
        ]
        self._table = (_CacheLayer * len(layers))(*layers)
        self._address = ctypes.addressof(self._table)
        library = load_library()
        self._kernel = None if library is None else library.ppd_kv_compact

    def run(
        self, src: np.ndarray | torch.Tensor, dst: np.ndarray | torch.Tensor
    ) -> None:
        """As `vllm_ppd.kernels.kv_compact.kv_compact_reference`, in order of i.

        Args:
            src: int64 [n] slots (block * block_size + offset), numpy or CPU tensor
            dst: int64 [n]

        Raises:
            ValueError: arrays of another type or length.
            IndexError: a slot outside the cache; then nothing has moved.
        """
        sources, targets = _pointer(src), _pointer(dst)
        moves = len(src)
        if len(dst) != moves:
            raise ValueError(f"{moves} sources but {len(dst)} targets")
        if self._kernel is None:
            slots = torch.stack([torch.as_tensor(src), torch.as_tensor(dst)])
            outside = ((slots < 0) | (slots >= self._num_slots)).any(0).tolist()
            bad = outside.index(True) + 1 if any(outside) else 0
            if not bad:
                kv_compact_reference(self._views, *slots)
        else:
            bad = self._kernel(self._address, len(self._table), sources, targets, moves)
        if bad:
            move = f"{int(src[bad - 1])} -> {int(dst[bad - 1])}"
            raise IndexError(f"move {move} leaves the KV cache")


def _pointer(slots: np.ndarray | torch.Tensor) -> int:
    if isinstance(slots, torch.Tensor):
        if slots.dtype == torch.int64 and slots.is_contiguous():
            return slots.data_ptr()
    elif slots.dtype == np.int64 and slots.flags.c_contiguous:
        return slots.ctypes.data
    raise ValueError(f"slots must be contiguous int64, not {slots.dtype}")
