"""Candidate filling on CPU: the whole batch in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.drafting import POOL, DraftInputs, BigramTensors, fill_trees
from vllm_ppd.trees.layout import TreeTables

__all__ = ["CpuTreeFiller"]


class _FillTables(ctypes.Structure):
    """Mirrors `struct FillTables` in fill_tree.cpp."""

    _fields_ = (
        ("parents", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("depths", ctypes.c_void_p),
        ("on_ngram", ctypes.c_void_p),
        ("num_nodes", ctypes.c_void_p),
        ("soft_ids", ctypes.c_void_p),
        ("nodes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("max_rank", ctypes.c_int64),
        ("bigram", ctypes.c_void_p),
        ("gains", ctypes.c_void_p),
        ("floor", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("pool", ctypes.c_int64),
    )


class CpuTreeFiller:
    """`candidates.fill_trees` for given trees and table, compiled where possible.

    Args:
        tables: the trees.
        bigram: the bigram table, if there is one.
        weights: [m] as in `fill_trees`.
    """

    def __init__(
        self,
        tables: TreeTables,
        bigram: BigramTable | None,
        weights: Sequence[float],
    ) -> None:
        self._tables = tables
        self._weights = np.array(weights, dtype=np.float64)
        self._bigram = bigram
        arrays = [
            np.ascontiguousarray(array, np.int64)
            for array in (
                tables.parents,
                tables.node_ranks,
                tables.node_depths,
                tables.num_nodes,
                tables.soft_ids,
            )
        ]
        chain = np.ascontiguousarray(tables.on_ngram, np.uint8)
        self._kept = arrays, chain  # what the addresses below point into
        parents, ranks, depths, num_nodes, soft_ids = arrays
        table = (0, 0, 0, 0)
        if bigram is not None:
            table = (
                bigram.ids.ctypes.data,
                bigram.gains.ctypes.data,
                bigram.floor.ctypes.data,
                bigram.ids.shape[1],
            )
        self._struct = _FillTables(
            *(a.ctypes.data for a in (parents, ranks, depths)),
            *(chain.ctypes.data, num_nodes.ctypes.data, soft_ids.ctypes.data),
            *(parents.shape[1], soft_ids.shape[1], tables.max_children - 1),
            *table,
            self._weights.ctypes.data,
            max(POOL, tables.max_children + 1),
        )
        self._address = ctypes.addressof(self._struct)
        library = load_library()
        self._kernel = None if library is None else library.ppd_fill_trees

    def run(self, trees: np.ndarray, inputs: DraftInputs) -> np.ndarray:
        """int64 [B, Q - 1], see `candidates.fill_trees`."""
        if self._kernel is None:
            # Made anew, because the table may be learning.
            table = (
                None if self._bigram is None else BigramTensors.of(self._bigram)
            )
            return fill_trees(self._tables, trees, inputs, table, self._weights)
        logits = inputs.logits.contiguous()
        ngrams = inputs.ngrams
        out = np.empty((len(trees), self._tables.soft_ids.shape[1] - 1), np.int64)
        self._kernel(
            self._address,
            len(trees),
            trees.ctypes.data,
            inputs.num_prompted.ctypes.data,
            logits.data_ptr(),
            logits.shape[1],
            inputs.roots.ctypes.data,
            ngrams.ctypes.data,
            ngrams.shape[1],
            out.ctypes.data,
        )
        return out
