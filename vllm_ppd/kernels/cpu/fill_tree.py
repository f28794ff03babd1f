"""Draft tokens of a tree on CPU: the whole batch in one call of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from vllm_ppd.kernels.cpu.build import load_library, struct
from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.drafting import POOL, DraftInputs, fill_trees
from vllm_ppd.trees.layout import TreeTables

_FillTables = struct(  # as in fill_tree.cpp
    [
        *("parents", "node_ranks", "node_depths", "num_nodes", "soft_ids", "on_ngram"),
        *("bigram_ids", "gains", "floor", "weights"),
    ],
    ["nodes", "rows", "max_rank", "num_listed", "pool"],
)


class CpuTreeFiller:
    """`trees.drafting.fill_trees` for given trees and table, compiled where possible.

    Args:
        tables: the trees.
        bigram: the bigram table on CPU, if there is one; it may go on learning.
        weights: [m] as in `fill_trees`.
    """

    def __init__(
        self,
        tables: TreeTables,
        bigram: BigramTensors | None,
        weights: Sequence[float],
    ) -> None:
        self._tables = tables
        self._weights = np.array(weights, dtype=np.float64)
        self._bigram = bigram
        names = ("parents", "node_ranks", "node_depths", "num_nodes", "soft_ids")
        arrays = [np.ascontiguousarray(getattr(tables, n), np.int64) for n in names]
        arrays.append(np.ascontiguousarray(tables.on_ngram, np.uint8))
        self._arrays = arrays  # keeps the memory alive
        self._struct = _FillTables(
            *(array.ctypes.data for array in arrays),
            *([0, 0, 0] if bigram is None else [t.data_ptr() for t in bigram]),
            self._weights.ctypes.data,
            tables.parents.shape[1],
            tables.soft_ids.shape[1],
            tables.max_children - 1,
            0 if bigram is None else bigram.ids.shape[1],
            max(POOL, tables.max_children + 1),
        )
        self._address = ctypes.addressof(self._struct)
        library = load_library()
        self._kernel = None if library is None else library.ppd_fill_trees

    def run(self, trees: np.ndarray, inputs: DraftInputs) -> np.ndarray:
        """int64 [B, Q - 1], see `fill_trees`; trees and inputs are int64 arrays."""
        if self._kernel is None:
            return fill_trees(self._tables, trees, inputs, self._bigram, self._weights)
        logits = inputs.logits.contiguous()
        ngrams = inputs.ngrams
        drafts = np.empty((len(trees), self._tables.soft_ids.shape[1] - 1), np.int64)
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
            drafts.ctypes.data,
        )
        return drafts
