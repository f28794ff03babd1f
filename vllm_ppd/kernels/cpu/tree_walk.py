"""Greedy verification and n-gram matching on CPU, compiled."""

from __future__ import annotations

import numpy as np

from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS, match_ngrams
from vllm_ppd.trees.verify import TreeWalk, kv_moves

_LOWS, _HIGHS = (np.array(bounds, np.int64) for bounds in zip(*LENGTHS, strict=True))


def walk_greedy_cpu(
    step: TreeStep, tokens: np.ndarray, picked: np.ndarray
) -> tuple[TreeWalk, np.ndarray, np.ndarray]:
    """The finished walk and its KV moves when every node's next token is known.

    Args:
        step: the layout of the batch's trees.
        tokens: int32 [sum of num_nodes] token of each node.
        picked: int64 [sum of num_nodes] the target's token after each node.

    Returns:
        the walk, and `verify.kv_moves` of it.
    """
    library = load_library()
    if library is None:
        walk = TreeWalk(step, tokens)
        walk.run_greedy(picked)
        return walk, *kv_moves(step, walk)
    tables, batch = step.tables, len(step.tree_ids)
    depths = tables.max_depth + 1
    walk = TreeWalk.empty(step)
    sources, targets = np.empty((2, batch * depths), dtype=np.int64)
    inputs = (step.tree_ids, step.starts, step.num_nodes, step.first_nodes)
    results = (walk.tokens_out, walk.paths, walk.lengths, walk.nodes)
    moves = library.ppd_walk_trees(
        tables.parents.ctypes.data,
        tables.parents.shape[1],
        batch,
        *(array.ctypes.data for array in (*inputs, tokens, picked)),
        depths,
        *(array.ctypes.data for array in (*results, sources, targets)),
    )
    return walk, sources[:moves], targets[:moves]


def match_ngrams_cpu(
    token_ids: np.ndarray, ends: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """`trees.ngram.match_ngrams`, compiled where possible; `token_ids` is int32."""
    library = load_library()
    if library is None or token_ids.dtype != np.int32 or token_ids.strides[1] != 4:
        return match_ngrams(token_ids, ends, context)
    batch = len(ends)
    classes = np.empty(batch, dtype=np.int64)
    drafts = np.empty((batch, MAX_NGRAM_DRAFTS), dtype=np.int64)
    ends = ends.astype(np.int64)
    library.ppd_match_ngrams(
        token_ids.ctypes.data,
        token_ids.strides[0] // 4,
        batch,
        ends.ctypes.data,
        context,
        _LOWS.ctypes.data,
        _HIGHS.ctypes.data,
        len(_LOWS),
        classes.ctypes.data,
        drafts.ctypes.data,
        MAX_NGRAM_DRAFTS,
    )
    return classes, drafts
