"""Online learning of a bigram table on CPU: one call of the compiled kernel."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from vllm_ppd.kernels.cpu.build import load_library, struct
from vllm_ppd.trees.bigram import (
    OBSERVED,
    ROW_MEMORY,
    SMOOTHING,
    OnlineBigram,
    learn_bigrams,
)

_OnlineTable = struct(  # as in bigram.cpp
    ["ids", "gains", "floor", "counts", "totals", "base", "base_total"],
    ["vocabulary", "n"],
)


class CpuBigramLearner:
    """`trees.bigram.learn_bigrams` for one table, compiled where possible."""

    def __init__(self, online: OnlineBigram) -> None:
        self._online = online
        counted = (online.counts, online.totals, online.base, online.base_total)
        pointers = [tensor.data_ptr() for tensor in (*online.table, *counted)]
        vocabulary, n = online.table.ids.shape
        self._listed = min(OBSERVED, vocabulary)
        self._struct = _OnlineTable(*pointers, vocabulary, n)
        self._address = ctypes.addressof(self._struct)
        library = load_library()
        self._kernel = None if library is None else library.ppd_learn_bigrams

    def run(self, tokens: np.ndarray, logits: torch.Tensor) -> None:
        """tokens: int64 [R]; logits: float32 [R, V]."""
        if self._kernel is None:
            learn_bigrams(self._online, torch.from_numpy(tokens), logits)
            return
        tokens, logits = np.ascontiguousarray(tokens, np.int64), logits.contiguous()
        self._kernel(
            self._address,
            len(tokens),
            tokens.ctypes.data,
            logits.data_ptr(),
            self._listed,
            SMOOTHING,
            ROW_MEMORY,
        )
