"""Draft tokens of trees: literal examples, and every kernel against the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.implementations import (
    DEVICE,
    kernels,
    needs_compiler,
    needs_triton,
)
from tests.kernels.trees import random_drafting
from vllm_ppd.kernels.cpu import CpuTreeFiller
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.drafting import POOL, DraftInputs, fill_trees
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy

UNTOUCHED = -7
# root -> a, b; a -> c; no prompt rows.
SMALL = SparseTree((0, 0, 1), (0, 1, 0), (0, 0, 0, 0))


def test_the_ngram_comes_first_and_only_once():
    policy = TreePolicy((SMALL, SMALL))
    tables = TreeTables(TreeMenu((MenuEntry((policy, policy)),)), 100)
    inputs = DraftInputs(
        num_prompted=np.array([1, 1]),
        logits=torch.tensor([[0.0, 2.5, 0.0, 1.0, 0.5, -1.0]] * 2),
        roots=np.array([2, 2]),
        ngrams=np.array([[1, 4], [1, 4]]),
    )
    # Trees 1 + 1 (class 0, num_prompted 1) and 1 + 2 + 1 (class 1, num_prompted 1).
    ids = fill_trees(tables, np.array([2, 4]), inputs, None, np.ones(1))
    # Without an n-gram draft: the row's best two; below a no token is listed.
    assert ids[0].tolist() == [1, 3, 0]
    # With it: 1 from the n-gram, 3 the best of the rest, and 4 follows 1 in the n-gram.
    assert ids[1].tolist() == [1, 3, 4]


@needs_compiler
@pytest.mark.parametrize("with_table", [True, False])
def test_compiled_against_the_core(with_table):
    for seed in range(40):
        tables, table, trees, inputs = random_drafting(seed, with_table)
        weights = table.weights if table else (1.0, 1.0, 1.0)
        ids = CpuTreeFiller(tables, table, weights).run(trees, inputs)
        bigram = BigramTensors.of(table) if table else None
        expected = fill_trees(tables, trees, inputs, bigram, np.array(weights))
        np.testing.assert_array_equal(ids, expected)


def on_device(inputs, num_prompts, pool):
    """The core's inputs, a row for every prompt token; absent ones are nan."""
    batch, vocabulary = len(inputs.num_prompted), inputs.logits.shape[1]
    num_prompted = torch.from_numpy(inputs.num_prompted)
    # vLLM pads vocabularies: rows may be cut out of longer ones.
    logits = torch.full((batch, num_prompts, vocabulary + 3), torch.nan, device=DEVICE)
    logits = logits[..., :vocabulary]
    present = torch.arange(num_prompts) < num_prompted[:, None]
    logits[present.to(DEVICE)] = inputs.logits.to(DEVICE)
    top = logits.topk(pool)
    ids = torch.where(top.values.isnan(), 12345, top.indices)
    num_prompted, roots, ngrams = (
        torch.as_tensor(array).int().to(DEVICE)
        for array in (num_prompted, inputs.roots, inputs.ngrams)
    )
    return kernels.fill_tree.DeviceDraftInputs(
        num_prompted, logits, ids, top.values, roots, ngrams
    )


@needs_triton
@pytest.mark.parametrize("with_table", [True, False])
def test_against_the_core(with_table):
    for seed in range(3):
        tables, table, trees, inputs = random_drafting(seed, with_table)
        weights = np.array(table.weights if table else (1.0, 1.0, 1.0))
        host = BigramTensors.of(table) if table else None
        want = fill_trees(tables, trees, inputs, host, weights)
        shape = (len(trees), want.shape[1] + 2)
        drafts = torch.full(shape, UNTOUCHED, dtype=torch.int64, device=DEVICE)
        kernels.fill_tree.fill_tree(
            DeviceTables.on(DEVICE, tables),
            torch.from_numpy(trees).int().to(DEVICE),
            on_device(inputs, 3, max(POOL, tables.max_children + 1)),
            BigramTensors.of(table, DEVICE) if table else None,
            torch.from_numpy(weights).float().to(DEVICE),
            drafts,
        )
        for got, expected, tree in zip(drafts.tolist(), want, trees, strict=True):
            end = tables.num_rows[tree] - 1
            assert got[:end] == expected[:end].tolist(), (seed, tree)
            assert set(got[end:]) == {0}


@needs_triton
def test_without_ngrams_and_cut_short():
    tables, table, trees, inputs = random_drafting(3)
    device_inputs = on_device(inputs, 3, POOL)
    ngrams = device_inputs.ngrams
    results = []
    for absent in (ngrams[:, :0], torch.full_like(ngrams, -1)):
        for width in (4, 12):
            drafts = torch.zeros(len(trees), width, dtype=torch.int32, device=DEVICE)
            kernels.fill_tree.fill_tree(
                DeviceTables.on(DEVICE, tables),
                torch.from_numpy(trees).int().to(DEVICE),
                device_inputs._replace(ngrams=absent),
                BigramTensors.of(table, DEVICE),
                torch.tensor(table.weights, device=DEVICE),
                drafts,
            )
            results.append(drafts[:, :4].tolist())
    assert results.count(results[0]) == 4
