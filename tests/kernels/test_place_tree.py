"""Laying out trees on the device: a mixed batch by hand, and the core's rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, kernels, needs_triton
from tests.kernels.trees import random_policy, random_rows, tables_of
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.layout import TreeStep

pytestmark = needs_triton
UNTOUCHED = -7


def run(tables, trees, num_rows, query_starts, contexts, spare=3, times=1):
    """Lay out so many times; `spare` rows of the buffers are behind the step's end."""
    query_starts = np.asarray(query_starts)
    lengths = np.diff(query_starts)
    seq_lens = np.asarray(contexts) + lengths
    # vLLM's positions: a line.
    positions = np.full(query_starts[-1] + spare, UNTOUCHED)
    for start, length, context in zip(query_starts, lengths, contexts, strict=False):
        positions[start : start + length] = context + np.arange(length)
    words = tables.ancestors.shape[2]
    out = SimpleNamespace(
        positions=torch.from_numpy(positions).to(DEVICE),
        ancestors=torch.full((len(positions), words), UNTOUCHED, device=DEVICE),
        depths=torch.full((len(positions),), UNTOUCHED, device=DEVICE).int(),
        starts=torch.full((len(lengths),), UNTOUCHED, device=DEVICE).int(),
        context_lens=torch.full((len(lengths),), UNTOUCHED, device=DEVICE).int(),
    )
    inputs = [
        torch.as_tensor(np.asarray(a)).to(DEVICE, torch.int32)
        for a in (trees, num_rows, query_starts, seq_lens)
    ]
    for _ in range(times):
        kernels.place_tree.place_tree(tables, *inputs, **vars(out))
    return SimpleNamespace(**{k: v.cpu().numpy() for k, v in vars(out).items()})


@pytest.mark.parametrize(("num_rows", "times"), [(None, 2), (100, 1), (129, 1)])
def test_against_the_pure_layout(num_rows, times):
    """Trees, whole or cut, then a prefill chunk of three tokens, then padding."""
    rng = np.random.default_rng(num_rows or 0)
    core = tables_of(random_policy(rng, 3, 20), num_rows)
    tables = DeviceTables.on(DEVICE, core)
    trees = rng.integers(0, 4, 11)
    rows = random_rows(rng, core, trees)
    plain_rows = rng.integers(0, 5, 11)  # rows of the request ahead of its tree
    contexts = rng.integers(0, 1000, 11)
    ends = np.cumsum(rows + plain_rows)
    step = TreeStep(core, trees, ends - rows, rows)
    step.tree_requests = np.arange(11)  # trees of one row too

    end = int(ends[-1])
    all_starts, all_contexts = [0, *ends, end + 3, end + 3], [*contexts, 4, 0]
    requests = [*trees, 0, 0], [*rows, 0, 0], all_starts, all_contexts
    got = run(tables, *requests, times=times)
    assert got.positions[end:].tolist() == [4, 5, 6, *[UNTOUCHED] * 3]
    where, trees, inner = step.tree_rows()
    depths = core.depths[trees, inner]
    assert got.starts[:11].tolist() == step.starts.tolist()
    assert got.context_lens[:11].tolist() == (contexts + plain_rows).tolist()
    assert got.context_lens[12] == 0
    assert got.depths[where].tolist() == depths.tolist()
    assert got.ancestors[where].tolist() == core.ancestors[trees, inner].tolist()
    roots = np.repeat(contexts + plain_rows, rows)
    assert got.positions[where].tolist() == (roots + depths).tolist()
    others = np.setdiff1d(np.arange(len(got.depths)), where)
    assert (got.depths[others] == UNTOUCHED).all()
    assert (got.ancestors[others] == UNTOUCHED).all()
