"""V2's trees follow the traffic: between steps, and never to the text's harm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.v2.test_exactness_v2 import GREEDY, prompts, same
from vllm_ppd.adaptive.learning import Places
from vllm_ppd.engine.v2.evidence_sums import EvidenceSums
from vllm_ppd.trees.menu import TreePlan
from vllm_ppd.trees.tree import TreePolicy, chain_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def searched(tiny_engine: dict[str, Any], tiny_prompts: str) -> dict[str, Any]:
    """An engine whose trees are the best ones for typical chances, at one request."""
    return {
        **tiny_engine,
        "max_num_seqs": 1,
        "speculative_config": {
            "method": "ppd",
            "model": tiny_prompts,
            "num_speculative_tokens": 11,
            "profile": "none",
        },
    }


def test_trees_are_exchanged_while_requests_run(
    plain, ppd, tiny_engine, tiny_ppd, tiny_trees
):
    """Other states, depths and numbers of prompt rows, in the middle of texts."""
    chains = TreePolicy(
        tuple(chain_tree(min(s, 2), (1,) * (min(s, 2) + 1), 2) for s in range(4))
    )
    plans = [
        TreePlan.of(policy).to_dict()
        for policy in (TreePolicy.load(tiny_trees), chains)
    ]
    requests = prompts(6, seed=61)
    for temperature in (0.0, 1.0):
        # More requests than run at once, which come and go between the changes.
        params = [
            {**GREEDY, "temperature": temperature, "seed": i, "max_tokens": 10 + 3 * i}
            for i in range(6)
        ]
        expected = plain.generate(tiny_engine, requests, params)
        before = ppd.accepted(tiny_ppd)
        found, changes = ppd.call(
            "in_turn", tiny_ppd, plans=plans, every=4, prompts=requests, params=params
        )
        same(expected, found)
        assert changes >= 4
        assert ppd.accepted(tiny_ppd) > before
    # With the trees from before it goes on as before.
    same(expected, ppd.generate(tiny_ppd, requests, params))


def test_the_traffic_changes_the_trees(plain, ppd, tiny_engine, searched):
    """From trees that guess nothing to some that do."""
    assert ppd.call("learns", searched)
    before = ppd.call("report", searched)
    requests = prompts(2, seed=67)
    params = {**GREEDY, "max_tokens": 24}
    expected = plain.generate(tiny_engine, requests, params)
    outputs, changes, moves = ppd.call(
        "learn", searched, prompts=requests, params=params, rounds=12
    )
    for output in outputs:
        same(expected, output)
    assert changes >= 1
    # Texts that wander begin and go on without matches, now and then with one.
    stayed = np.array(moves)[:, 0, 0].sum()
    assert 0 < stayed < np.array(moves).sum()
    after = ppd.call("report", searched)
    assert after["plan_changes"] == changes
    found = [tier["policies"] for tier in after["plan"]["tiers"]]
    assert any(tree["parents"] for tree in found[0][0]["trees"])
    # Rows per load are vLLM's, whatever the trees.
    assert [t["max_requests"] for t in after["plan"]["tiers"]] == [
        t["max_requests"] for t in before["plan"]["tiers"]
    ]
    same(expected, ppd.generate(searched, requests, params))


def test_the_host_waits_for_nothing_that_is_learnt(ppd, searched):
    requests = prompts(3, seed=41)
    params = {**GREEDY, "max_tokens": 10}
    found = ppd.call("host_reads", searched, prompts=requests, params=params)
    assert found == ["sampling.py:_sample:numpy"]


def test_moves_between_match_classes():
    sums = EvidenceSums(Places(prompts=2, ranks=3, classes=1, depths=4), CPU)
    before = torch.tensor([0, 0, -1, 1, 1, 0])
    after = torch.tensor([1, 1, 0, 0, 1, -1], dtype=torch.int32)
    accepted = torch.tensor([False, True, True, False, False, True])
    sums.add_moves(before, after, torch.tensor([4, 4, 4, 4, 0, 4]), accepted)
    sums.add_ends(before[:1], after[:1], torch.tensor([1]))
    parts = sums.parts(sums.values.numpy())
    assert parts.moves.tolist() == [[[0, 5], [4, 0]], [[0, 5], [0, 0]]]
    # Two prompt tokens of three ranks, three without, a chain of four, six beside it.
    assert len(parts.tries) == len(parts.hits) == 6 + 3 + 4 + 6
    assert not parts.tries.any() and not parts.hits.any()
    assert parts.tokens.tolist() == [0]


def test_learning_can_be_switched_off(ppd, searched):
    speculative = {**searched["speculative_config"], "online": False}
    engine = {**searched, "speculative_config": speculative}
    assert not ppd.call("learns", engine)


def test_trees_of_ones_own_stay(ppd, tiny_ppd):
    speculative = {**tiny_ppd["speculative_config"], "online": True}
    assert not ppd.call("learns", {**tiny_ppd, "speculative_config": speculative})
