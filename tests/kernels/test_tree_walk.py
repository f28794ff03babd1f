"""Tree walks of Triton and C++ are the core's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, kernels, needs_compiler, needs_triton
from tests.kernels.trees import random_drafting, random_policy, random_rows, tables_of
from vllm_ppd.kernels.cpu.tree_walk import walk_greedy_cpu
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk, kv_moves


def on_device(*arrays, dtype=torch.int32):
    return [torch.as_tensor(np.asarray(a)).to(DEVICE, dtype) for a in arrays]


def run(tables, trees, starts, num_rows, input_ids, sampled, sampled_starts):
    tensors = on_device(trees, starts, num_rows, input_ids)
    sampled = torch.as_tensor(np.asarray(sampled), dtype=torch.int64, device=DEVICE)
    result = kernels.tree_walk.tree_walk(
        tables, *tensors, sampled, *on_device(sampled_starts)
    )
    return SimpleNamespace(
        **{name: t.cpu().numpy() for name, t in result._asdict().items()}
    )


@needs_triton
@pytest.mark.parametrize(("prompts", "ept"), [(3, 1), (3, 2), (0, 1)])
@pytest.mark.parametrize("batch", [1, 13])
def test_against_the_core(batch, prompts, ept):
    for seed in range(3):
        rng = np.random.default_rng([seed, batch, ept])
        core = tables_of(random_policy(rng, prompts, 12, ept), num_rows=100)
        tables = DeviceTables.on(DEVICE, core)
        trees = rng.integers(0, len(core.num_nodes), batch)
        num_rows = random_rows(rng, core, trees)
        gaps = rng.integers(0, 4, batch)
        starts = np.cumsum(num_rows + gaps) - num_rows
        step = TreeStep(core, trees, starts, num_rows)
        # Few distinct tokens, so that walks go on.
        ids = rng.integers(0, 3, starts[-1] + num_rows[-1])
        picked = rng.integers(0, 3, step.num_nodes.sum())
        expected = TreeWalk(step, ids[step.node_rows])
        expected.run_greedy(picked)
        rows, counts = step.prompt_rows(expected.nodes)

        # Behind the requests, two that pad the batch.
        padded = [*trees, 0, 1], [*starts, *[ids.size] * 2], [*num_rows, 0, 0]
        first_nodes = [*step.first_nodes, *[picked.size] * 2]
        got = run(tables, *padded, ids, picked, first_nodes)
        assert (got.tokens[batch:] == -1).all()
        for name, array in vars(got).items():
            assert name == "tokens" or not array[batch:].any(), name
        got = SimpleNamespace(**{k: array[:batch] for k, array in vars(got).items()})
        assert got.tokens.tolist() == expected.tokens_out.tolist()
        assert got.num_sampled.tolist() == expected.lengths.tolist()
        assert got.paths.tolist() == expected.paths.tolist()
        assert got.num_prompted.tolist() == counts.tolist()
        present = np.arange(got.prompt_rows.shape[1]) < (counts * ept)[:, None]
        assert got.prompt_rows[present].tolist() == rows.tolist()
        roots = np.broadcast_to(starts[:, None], present.shape)
        assert (got.prompt_rows == roots)[~present].all()


@needs_compiler
def test_compiled_against_the_core():
    rng = np.random.default_rng(0)
    num_moves = 0
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
        got, *moves = walk_greedy_cpu(step, tokens, picked)
        for name in ("tokens_out", "paths", "lengths", "nodes"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        for array, other in zip(moves, kv_moves(step, expected), strict=True):
            np.testing.assert_array_equal(array, other)
        num_moves += len(moves[0])
    assert num_moves > 10
