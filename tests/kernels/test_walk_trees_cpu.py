"""The compiled walk and matcher against the reference."""

import numpy as np
import pytest

from tests.kernels.trees import random_drafting
from vllm_ppd.kernels.cpu import load_library, match_ngrams_cpu, walk_greedy_cpu
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.ngram import match_ngrams
from vllm_ppd.trees.verify import TreeWalk, kv_moves

pytestmark = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")


def test_walks():
    rng = np.random.default_rng(0)
    moved = 0
    for seed in range(60):
        tables, _, trees, _ = random_drafting(seed)
        # Trees may be cut anywhere, and lie anywhere among the step's rows.
        rows = np.array([rng.integers(1, tables.num_rows[t] + 1) for t in trees])
        starts = np.cumsum(rows + rng.integers(0, 5, len(rows))) - rows
        step = TreeStep(tables, trees, starts, rows)
        tokens = rng.integers(0, 3, len(step.node_rows)).astype(np.int32)
        picked = rng.integers(0, 3, len(step.node_rows))
        expected = TreeWalk(step, tokens)
        expected.run_greedy(picked)
        found, *moves = walk_greedy_cpu(step, tokens, picked)
        for name in ("tokens_out", "paths", "lengths", "nodes"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        for one, other in zip(moves, kv_moves(step, expected), strict=True):
            np.testing.assert_array_equal(one, other)
        moved += len(moves[0])
    assert moved > 10


@pytest.mark.parametrize("context", [6, 1000])
def test_matches(context):
    rng = np.random.default_rng(0)
    for _ in range(200):
        vocabulary = int(rng.integers(2, 6))
        token_ids = rng.integers(0, vocabulary, (3, 40)).astype(np.int32)
        ends = rng.integers(1, 41, 3).astype(np.int32)
        found = match_ngrams_cpu(token_ids, ends, context)
        for one, other in zip(
            found, match_ngrams(token_ids, ends, context), strict=True
        ):
            np.testing.assert_array_equal(one, other)
