"""What a walk says of the evidence on the device is what it says on the host."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE
from tests.kernels.trees import FIRST_SOFT_ID, random_plan, random_rows
from vllm_ppd.adaptive.learning import EvidenceLearner
from vllm_ppd.kernels.evidence_counts import count_evidence
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_walk import tree_walk_reference
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk

# Fewer ranks and depths than trees have, so that some candidates have no place.
RANKS = np.array([0.3, 0.1])
EVIDENCE = AcceptanceModel(
    np.array([RANKS] * 3),
    RANKS,
    np.full((2, 3), 0.5),
    np.array([[RANKS] * 3] * 2),
    np.full((2, 3, 3), 1 / 3),
    np.array([RANKS] * 4),
)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(array, device=DEVICE)


@pytest.mark.parametrize("ept", [1, 2])
@pytest.mark.parametrize("batch", [1, 11])
def test_against_the_host(batch, ept):
    places = EvidenceLearner(EVIDENCE).places
    seen = np.zeros(places.firsts[-1])
    for seed in range(5):
        random.seed(f"{seed} {batch} {ept}")
        rng = np.random.default_rng([seed, batch, ept])
        plan = random_plan(ept)
        pure = TreeTables(plan, FIRST_SOFT_ID, 80)
        tables = DeviceTables.on(DEVICE, pure)
        ids = np.arange(len(plan.trees)) - 1
        # One less than the trees are deep, so that some guesses have no prompt row.
        states_of = np.where(ids >= 0, np.maximum(ids % 4 - 1, 0), 0)
        classes_of = np.where(ids >= 0, ids // 4 % 3, 0)
        # The classes of one load are lines, say, and not to be counted.
        left_out = (ids >= 0) & (ids // 4 == 5)
        learner = EvidenceLearner(EVIDENCE)
        tries, hits = torch.zeros(
            2, places.firsts[-1] + 1, dtype=torch.int64, device=DEVICE
        )
        for _ in range(4):
            trees = rng.integers(0, len(plan.trees), batch)
            num_rows = random_rows(pure, trees)
            starts = np.cumsum(num_rows) - num_rows
            # Few distinct tokens, so that walks go on.
            tokens = rng.integers(0, 3, num_rows.sum())
            picked = rng.integers(0, 3, num_rows.sum())
            kept = np.flatnonzero(~left_out[trees])
            if len(kept):
                rows = num_rows[kept]
                where = np.concatenate(
                    [np.arange(starts[i], starts[i] + num_rows[i]) for i in kept]
                )
                step = TreeStep(pure, trees[kept], np.cumsum(rows) - rows, rows)
                walk = TreeWalk(step, tokens[where][step.node_rows])
                walk.run_greedy(picked[where][step.node_rows])
                learner.observe_walk(
                    step, walk, states_of[trees[kept]], classes_of[trees[kept]]
                )
            count_evidence(
                tries,
                hits,
                places,
                tables,
                tensor(states_of),
                tensor(np.where(left_out, -1, classes_of)),
                tensor(trees),
                tensor(num_rows).int(),
                tree_walk_reference(
                    tables,
                    tensor(trees),
                    tensor(starts),
                    tensor(num_rows),
                    tensor(tokens),
                    tensor(picked),
                    tensor(starts),
                ),
            )
        assert tries[:-1].tolist() == learner._tries.tolist()
        assert hits[:-1].tolist() == learner._hits.tolist()
        seen += learner._hits
    if batch > 1:
        firsts = places.firsts
        # Something of every source came true.
        assert (np.add.reduceat(seen, firsts[:-1]) > 0).all()
