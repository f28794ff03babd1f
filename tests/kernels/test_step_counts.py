"""What a step adds to the counts on the device is what it adds on the host."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE
from tests.kernels.trees import FIRST_SOFT_ID, random_plan, random_policy, random_rows
from vllm_ppd.engine.step_counts import Slot, StepCounts
from vllm_ppd.kernels.step_counts import count_step
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_walk import tree_walk_reference
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk


@pytest.mark.parametrize("ept", [1, 2])
@pytest.mark.parametrize("batch", [1, 11])
def test_against_the_host(batch, ept):
    for seed in range(5):
        random.seed(f"{seed} {batch} {ept}")
        rng = np.random.default_rng([seed, batch, ept])
        plan = random_plan(ept)
        pure = TreeTables(plan, FIRST_SOFT_ID, 80)
        tables = DeviceTables.on(DEVICE, pure)
        # One less than the trees are deep, so that some guesses have no prompt row.
        states_of = np.maximum((np.arange(len(plan.trees)) - 1) % 4 - 1, 0)
        states_of[0] = 0
        host = StepCounts(4)
        device = torch.zeros(len(host.values), dtype=torch.int64, device=DEVICE)
        for _ in range(4):
            trees = rng.integers(0, len(plan.trees), batch)
            num_rows = random_rows(pure, trees)
            starts = np.cumsum(num_rows) - num_rows
            step = TreeStep(pure, trees, starts, num_rows)
            # Few distinct tokens, so that walks go on.
            ids = rng.integers(0, 3, num_rows.sum())
            picked = rng.integers(0, 3, num_rows.sum())
            walk = TreeWalk(step, ids[step.node_rows])
            walk.run_greedy(picked[step.node_rows])
            host.add(step, walk, states_of[trees])

            def tensor(array: np.ndarray) -> torch.Tensor:
                return torch.as_tensor(array, device=DEVICE)

            count_step(
                device,
                tables,
                tensor(states_of),
                tensor(trees),
                tensor(num_rows).int(),
                tree_walk_reference(
                    tables,
                    tensor(trees),
                    tensor(starts),
                    tensor(num_rows),
                    tensor(ids),
                    tensor(picked),
                    tensor(starts),
                ),
            )
        assert device.tolist() == host.values.tolist()
        sources = slice(Slot.FIRST_SOURCE, Slot.FIRST_STATE)
        if batch > 1:
            assert (host.values[sources] > 0).all()


def test_padding_behind_a_bare_root_is_no_speculation():
    pure = TreeTables(TreePlan((Tier(None, (random_policy(),)),)), FIRST_SOFT_ID, 8)
    counts = torch.zeros(Slot.FIRST_STATE + 4, dtype=torch.int64, device=DEVICE)
    ids = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    zero, rows = ids[:1], torch.tensor([8], dtype=torch.int32, device=DEVICE)
    tables = DeviceTables.on(DEVICE, pure)
    walk = tree_walk_reference(tables, zero, zero, rows, ids, ids, zero)
    count_step(counts, tables, ids.new_zeros(5), zero, rows, walk)
    seen = {slot.name: int(counts[slot]) for slot in Slot if counts[slot]}
    assert seen == {"PLAIN": 1, "TOKENS": 1, "ROWS": 8}
