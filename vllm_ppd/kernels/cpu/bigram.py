"""Learning bigram on CPU: all observations in one call of the compiled kernel."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.trees.bigram import SMOOTHING
from vllm_ppd.trees.bigram_learning import (
    LISTED,
    MOST,
    OnlineBigram,
    learn_bigrams,
)

__all__ = ["CpuBigramLearner"]


class _LiveTable(ctypes.Structure):
    """Mirrors `struct LiveTable` in bigram.cpp."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("gains", ctypes.c_void_p),
        ("floor", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("base_total", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int64),
        ("n", ctypes.c_int64),
    )


class CpuBigramLearner:
    """`successor_learning.learn_bigrams` for one table, compiled where possible."""

    def __init__(self, live: OnlineBigram) -> None:
        self._live = live
        table = live.table
        tensors = (*table, live.counts, live.totals, live.base, live.base_total)
        vocabulary, n = table.ids.shape
        self._listed = min(LISTED, vocabulary)
        self._struct = _LiveTable(*(t.data_ptr() for t in tensors), vocabulary, n)
        self._address = ctypes.addressof(self._struct)
        library = load_library()
        self._kernel = None if library is None else library.ppd_learn_bigrams

    def run(self, tokens: np.ndarray, logits: torch.Tensor) -> None:
        """tokens: int64 [R]; logits: float32 [R, V]."""
        if self._kernel is None:
            learn_bigrams(self._live, torch.from_numpy(tokens), logits)
            return
        tokens, logits = np.ascontiguousarray(tokens, np.int64), logits.contiguous()
        self._kernel(
            self._address,
            len(tokens),
            tokens.ctypes.data,
            logits.data_ptr(),
            self._listed,
            SMOOTHING,
            MOST,
        )
