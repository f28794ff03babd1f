"""Draft tokens of trees: literal examples, and every kernel against the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, kernels, needs_compiler, needs_triton
from tests.kernels.trees import random_drafting
from vllm_ppd.kernels.cpu.fill_tree import CpuTreeFiller
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.drafting import POOL, fill_trees

UNTOUCHED = -7
# Whether there is a bigram table, and the number of prompt tokens.
SOURCES = pytest.mark.parametrize(
    ("with_table", "m"), [(True, 3), (False, 3), (True, 0), (False, 0)]
)


@needs_compiler
@SOURCES
def test_compiled_against_the_core(with_table, m):
    for seed in range(40):
        tables, table, trees, inputs = random_drafting(seed, with_table, m)
        weights = table.weights if table else (1.0,) * m
        bigram = BigramTensors.of(table) if table else None
        ids = CpuTreeFiller(tables, bigram, weights).run(trees, inputs)
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


def fill(tables, table, trees, inputs, drafts, m=3):
    weights = torch.tensor(table.weights if table else (1.0,) * m)
    kernels.fill_tree.fill_tree(
        DeviceTables.on(DEVICE, tables),
        torch.from_numpy(trees).int().to(DEVICE),
        inputs,
        BigramTensors.of(table, DEVICE) if table else None,
        weights.float().to(DEVICE),
        drafts,
    )


@needs_triton
@SOURCES
def test_against_the_core(with_table, m):
    for seed in range(3):
        tables, table, trees, inputs = random_drafting(seed, with_table, m)
        weights = np.array(table.weights if table else (1.0,) * m)
        host = BigramTensors.of(table) if table else None
        want = fill_trees(tables, trees, inputs, host, weights)
        shape = (len(trees), want.shape[1] + 2)
        drafts = torch.full(shape, UNTOUCHED, dtype=torch.int64, device=DEVICE)
        device_inputs = on_device(inputs, m or 1, max(POOL, tables.max_children + 1))
        fill(tables, table, trees, device_inputs, drafts, m)
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
            without = device_inputs._replace(ngrams=absent)
            fill(tables, table, trees, without, drafts)
            results.append(drafts[:, :4].tolist())
    assert results.count(results[0]) == 4
