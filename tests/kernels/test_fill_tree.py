"""Conditioned inputs on the device, against the pure core's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS
from tests.kernels.trees import random_drafting
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.fill_tree import DeviceDraftInputs, fill_tree_reference
from vllm_ppd.trees.drafting import POOL, BigramTensors, fill_trees

UNTOUCHED = -7


@pytest.fixture(params=IMPLEMENTATIONS)
def fill(request):
    if request.param == "reference":
        return fill_tree_reference
    from vllm_ppd.kernels.triton.fill_tree import fill_tree

    return fill_tree


def on_device(inputs, num_prompts, pool):
    """The core's inputs, a row for every prompt token; absent ones are nan."""
    batch, vocabulary = len(inputs.num_prompted), inputs.logits.shape[1]
    # vLLM pads vocabularies: rows may be cut out of longer ones.
    logits = torch.full((batch, num_prompts, vocabulary + 3), torch.nan)
    logits = logits[..., :vocabulary]
    logits[
        torch.arange(num_prompts) < torch.from_numpy(inputs.num_prompted)[:, None]
    ] = inputs.logits
    top = logits.topk(pool)
    ids = torch.where(top.values.isnan(), 12345, top.indices)
    return DeviceDraftInputs(
        *(
            tensor.to(DEVICE)
            for tensor in (
                torch.from_numpy(inputs.num_prompted).int(),
                logits,
                ids,
                top.values,
                torch.from_numpy(inputs.roots).int(),
                torch.from_numpy(inputs.ngrams).int(),
            )
        )
    )


@pytest.mark.parametrize("with_table", [True, False])
def test_against_the_core(fill, with_table):
    for seed in range(3):
        pure, table, trees, inputs = random_drafting(seed, with_table)
        weights = np.array(table.weights if table else (1.0, 1.0, 1.0))
        host = BigramTensors.of(table) if table else None
        want = fill_trees(pure, trees, inputs, host, weights)

        tables = DeviceTables.on(DEVICE, pure)
        drafts = torch.full(
            (len(trees), want.shape[1] + 2), UNTOUCHED, dtype=torch.int64, device=DEVICE
        )
        fill(
            tables,
            torch.from_numpy(trees).int().to(DEVICE),
            on_device(inputs, 3, max(POOL, pure.max_children + 1)),
            BigramTensors.of(table, DEVICE) if table else None,
            torch.from_numpy(weights).float().to(DEVICE),
            drafts,
            5,
        )
        for got, expected, tree in zip(drafts.tolist(), want, trees, strict=True):
            end = pure.num_rows[tree] - 1
            assert got[:end] == expected[:end].tolist(), (seed, tree)
            assert set(got[end:]) == {5}


def test_without_ngrams_and_cut_short(fill):
    pure, table, trees, inputs = random_drafting(3)
    weights = torch.tensor(table.weights)
    on = on_device(inputs, 3, POOL)
    tables = DeviceTables.on(DEVICE, pure)
    results = []
    for ngrams in (on.ngrams[:, :0], torch.full_like(on.ngrams, -1)):
        for width in (4, 12):
            drafts = torch.zeros(len(trees), width, dtype=torch.int32, device=DEVICE)
            fill(
                tables,
                torch.from_numpy(trees).int().to(DEVICE),
                on._replace(ngrams=ngrams),
                BigramTensors.of(table, DEVICE),
                weights.to(DEVICE),
                drafts,
            )
            results.append(drafts[:, :4].tolist())
    assert results.count(results[0]) == 4
