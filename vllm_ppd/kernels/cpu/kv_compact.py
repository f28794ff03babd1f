"""KV compaction on CPU: all layers in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.kv_compact import kv_compact_reference

__all__ = ["CpuKVCompactor"]


class _CacheLayer(ctypes.Structure):
    """Mirrors `struct CacheLayer` in kv_compact.cpp."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("item_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class CpuKVCompactor:
    """Moves tokens between slots of the given caches, built once at start.

    Args:
        kv_caches: per layer [num_blocks, kv_heads, block_size, 2 * D] as in `layout`;
            all share one numbering of slots (one KV cache group).
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        self._caches = list(kv_caches)  # keeps the memory alive
        self._keys = [key_view(cache) for cache in self._caches]
        self._values = [value_view(cache) for cache in self._caches]
        rows = []
        for cache in self._caches:
            size = cache.element_size()
            if size not in (1, 2, 4):
                raise ValueError(f"cannot compact a KV cache of {cache.dtype}")
            blocks, heads, block_size, width = cache.shape
            block, head = (stride * size for stride in cache.stride()[:2])
            rows.append(
                _CacheLayer(
                    cache.data_ptr(),
                    *(blocks, heads, block_size, width // 2),
                    *(size, block, head),
                )
            )
        self._table = (_CacheLayer * len(rows))(*rows)
        self._address = ctypes.addressof(self._table)
        self._library = load_library()
        if self._library is not None:
            self._kernel = self._library.ppd_kv_compact

    def run(
        self, src: np.ndarray | torch.Tensor, dst: np.ndarray | torch.Tensor
    ) -> None:
        """Copy slot src[i] to dst[i], in order, in every layer and KV head.

        Args:
            src: int64 [n] slots (block * block_size + offset), numpy or CPU tensor
            dst: int64 [n]
        """
        sources, targets = _pointer(src), _pointer(dst)
        moves = len(src)
        if len(dst) != moves:
            raise ValueError(f"{moves} sources but {len(dst)} targets")
        if self._library is None:
            kv_compact_reference(
                self._keys, self._values, torch.as_tensor(src), torch.as_tensor(dst)
            )
            return
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
