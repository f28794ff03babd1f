"""Draft ids on the device, against the pure core's."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS
from tests.kernels.trees import FIRST_SOFT_ID, random_policy, tables_of
from vllm_ppd.candidates import fill_drafts
from vllm_ppd.kernels.fill_tree import fill_tree_reference
from vllm_ppd.kernels.tree_tables import TreeTables
from vllm_ppd.tree import SparseTree, TreePolicy, chain_tree

UNTOUCHED = -7


@pytest.fixture(params=IMPLEMENTATIONS)
def fill(request):
    if request.param == "reference":
        return fill_tree_reference
    from vllm_ppd.kernels.triton.fill_tree import fill_tree

    return fill_tree


def run(fill, tables, trees, best, width, filler=0, dtype=torch.int64):
    trees = torch.as_tensor(np.asarray(trees)).to(DEVICE, torch.int32)
    best = torch.as_tensor(best, dtype=torch.int64, device=DEVICE)
    drafts = torch.full((len(trees), width), UNTOUCHED, dtype=dtype, device=DEVICE)
    fill(tables, trees, best, drafts, filler)
    return drafts.cpu().tolist()


def test_a_tree_by_hand(fill):
    tree = SparseTree((0, 0, 2), (0, 2, 1), (1, 0, 2, 0))
    policy = TreePolicy((chain_tree(0, [2]), chain_tree(1, [1, 0]), tree))
    tables = TreeTables.on(DEVICE, tables_of(policy, num_rows=9))
    best = [[[10, 11, 12], [20, 21, 22]]] * 2
    soft = FIRST_SOFT_ID
    assert run(fill, tables, [2, 0], best, 8, filler=1) == [
        [10, 12, 21, soft, soft, soft + 1, 1, 1],
        [soft, soft + 1, 1, 1, 1, 1, 1, 1],
    ]
    # Cut short; and with room behind the last row that the tables know.
    assert run(fill, tables, [2], best[:1], 2) == [[10, 12]]
    assert run(fill, tables, [2], best[:1], 10)[0][6:] == [0] * 4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("batch", "ept"), [(1, 1), (9, 2)])
def test_against_the_pure_drafts(fill, batch, ept, dtype):
    random.seed(batch)
    rng = np.random.default_rng(batch)
    pure = tables_of(random_policy(4, 20, ept), num_rows=128)
    tables = TreeTables.on(DEVICE, pure)
    states = rng.integers(0, len(pure.num_nodes), batch)
    k = pure.max_candidates + 1
    best = rng.integers(0, 1000, (batch, tables.num_prompt_tokens, k))
    flat = np.concatenate([b[:s] for b, s in zip(best, states, strict=True)])
    want = fill_drafts(pure, states, states, flat)
    got = run(fill, tables, states, best, 127, filler=5, dtype=dtype)
    for row, expected in zip(got, want, strict=True):
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {5}
