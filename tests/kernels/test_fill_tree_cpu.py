"""Candidate filling: a literal example, and the compiled kernel against torch."""

import numpy as np
import pytest
import torch

from tests.kernels.trees import random_drafting
from vllm_ppd.kernels.cpu import CpuTreeFiller, load_library
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.drafting import (
    BigramTensors,
    DraftInputs,
    fill_trees,
    rank_children,
)
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy

# root -> a, b; a -> c; no prompt rows, to look at candidates only.
SMALL = SparseTree((0, 0, 1), (0, 1, 0), (0, 0, 0, 0))


def small_table(weights=(1.0,)):
    """6 tokens: after 0 comes 3 or 4, after 3 comes 5; others list 0 and 1."""
    ids = np.tile(np.array([0, 1]), (6, 1))
    gains = np.full((6, 2), -1.0)
    ids[0], gains[0] = (3, 4), (3.0, 1.0)
    ids[3], gains[3] = (5, 2), (4.0, 0.5)
    return BigramTable(ids, gains, np.full(6, -1.0), weights, np.full(6, 1 / 6))


def test_children_follow_the_prompt_row_and_the_parent():
    bigram = BigramTensors.of(small_table())
    logits = torch.tensor([[0.0, 2.5, 0.0, 1.0, 0.5, -1.0]])
    plain = rank_children(logits, torch.tensor([0]), None, 1.0, 2)
    assert plain.tolist() == [[1, 3]]
    # 1.0 + 3.0 for token 3 beats 2.5 - 1.0 for token 1 and 0.5 + 1.0 for token 4.
    given = rank_children(logits, torch.tensor([0]), bigram, 1.0, 3)
    assert given.tolist()[0][0] == 3
    assert sorted(given.tolist()[0][1:]) == [1, 4]
    alone = rank_children(None, torch.tensor([3]), bigram, 0.0, 3)
    assert alone.tolist() == [[5, 2, -1]]


def test_the_ngram_comes_first_and_only_once():
    policy = TreePolicy((SMALL, SMALL))
    tables = TreeTables(TreeMenu((MenuEntry((policy, policy)),)), 100)
    inputs = DraftInputs(
        num_prompted=np.array([1, 1]),
        logits=torch.tensor([[0.0, 2.5, 0.0, 1.0, 0.5, -1.0]] * 2),
        roots=np.array([2, 2]),
        ngrams=np.array([[1, 4], [1, 4]]),
    )
    # Trees 1 + 1 (class 0, state 1) and 1 + 2 + 1 (class 1, state 1).
    ids = fill_trees(tables, np.array([2, 4]), inputs, None, np.ones(1))
    # Without an n-gram draft: the row's best two; below a nothing is known.
    assert ids[0].tolist() == [1, 3, 0]
    # With it: 1 from the n-gram, 3 the best of the rest, and 4 follows 1 in the n-gram.
    assert ids[1].tolist() == [1, 3, 4]


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("with_table", [True, False])
def test_the_kernel_equals_the_reference(with_table):
    for seed in range(40):
        tables, table, trees, inputs = random_drafting(seed, with_table)
        weights = table.weights if table else (1.0, 1.0, 1.0)
        found = CpuTreeFiller(tables, table, weights).run(trees, inputs)
        on_device = BigramTensors.of(table) if table else None
        expected = fill_trees(tables, trees, inputs, on_device, np.array(weights))
        np.testing.assert_array_equal(found, expected)


def test_siblings_differ():
    """A second child with its sibling's token could never be accepted."""
    for seed in range(20):
        tables, table, trees, inputs = random_drafting(seed)
        if (inputs.num_prompted == 0).any():
            continue
        ids = fill_trees(
            tables, trees, inputs, BigramTensors.of(table), np.array(table.weights)
        )
        for tree, row, count in zip(trees, ids, inputs.num_prompted, strict=True):
            tokens = np.append(0, row)
            seen = set()
            for node in range(1, tables.num_nodes[tree]):
                if tables.node_depths[tree, node] <= count:
                    key = int(tables.parents[tree, node]), int(tokens[node])
                    assert key not in seen
                    seen.add(key)
