"""The trees that are served when the user names none."""

import dataclasses
import json

import numpy as np
import pytest

from vllm_ppd.config import PPDConfigError
from vllm_ppd.search.acceptance import AcceptanceModel, MeasurementError
from vllm_ppd.search.acceptance_table import AcceptanceError, AcceptanceStats
from vllm_ppd.search.defaults import (
    acceptance_of,
    evidence_of,
    row_limit,
    typical_acceptance,
)
from vllm_ppd.search.plan_choice import PlanSettings
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy, chain_tree


def settings(folder, **other) -> PlanSettings:
    values = {
        "path": str(folder),
        "num_prompt_tokens": 3,
        "num_ept": 1,
        "device": "cuda",
        "max_rows": 16,
        "max_requests": 64,
        **other,
    }
    return PlanSettings(**values)


def test_row_limits():
    assert row_limit("cpu", 1, None) == 16
    assert row_limit("cpu", 20, None) == 21
    assert row_limit("cuda", 1, 7) == 8
    with pytest.raises(PPDConfigError, match="one prompt token takes 2 rows"):
        row_limit("cpu", 2, 1)


def test_measured_acceptance_is_preferred(tmp_path):
    assert acceptance_of(tmp_path, 3).num_prompt_tokens == 3
    AcceptanceStats(np.full((2, 4), 0.2)).save(tmp_path / "acceptance.json")
    assert acceptance_of(tmp_path, 2).acceptance[0, 0] == 0.2
    with pytest.raises(AcceptanceError, match="2 prompt tokens, but the folder"):
        acceptance_of(tmp_path, 3)


def test_evidence_of_a_folder(tmp_path):
    stats = typical_acceptance(3)
    bare = evidence_of(tmp_path, 3, bigram=False, ngram=False)
    np.testing.assert_allclose(bare.prompted, stats.acceptance)
    assert (bare.num_classes, bare.unprompted.any()) == (1, False)
    # Without measurements matches are taken to be as in ordinary text.
    assert evidence_of(tmp_path, 3, bigram=False, ngram=True).num_classes == 3
    measured = AcceptanceModel(
        stats.acceptance / 2,
        np.full(10, 0.05),
        np.full((2, 4), 0.5),
        np.full((2, 3, 10), 0.03),
        np.full((2, 3, 3), 1 / 3),
        np.full((4, 10), 0.04),
    )
    measured.save(tmp_path / "acceptance.json")
    found = evidence_of(tmp_path, 3, bigram=True, ngram=True)
    np.testing.assert_array_equal(found.prompted, measured.prompted)
    # Without matches there are no easier and harder steps to tell apart.
    found = evidence_of(tmp_path, 3, bigram=True, ngram=False)
    np.testing.assert_array_equal(found.prompted, measured.overall[:3])
    # Without the table its ranks mean nothing; the chains stay as measured.
    found = evidence_of(tmp_path, 3, bigram=False, ngram=True)
    np.testing.assert_allclose(found.prompted, stats.acceptance)
    np.testing.assert_array_equal(found.chain, measured.chain)
    with pytest.raises(
        MeasurementError, match="3 prompt tokens, but the folder holds 2"
    ):
        evidence_of(tmp_path, 2, bigram=True, ngram=True)


def test_a_plan_of_the_users_own(tmp_path):
    policy = TreePolicy(tuple(chain_tree(s, (3,) * (s + 1)) for s in range(4)))
    path = tmp_path / "policy.json"
    policy.save(path)
    plan, expected = settings(tmp_path, tree=str(path)).choose(None)
    assert (plan, expected) == (TreePlan.of(policy), [])
    with pytest.raises(PPDConfigError, match="too small for the tree policy"):
        settings(tmp_path, tree=str(path), max_rows=4).choose(None)
    with pytest.raises(PPDConfigError, match="for 3 prompt tokens of 1 EPT"):
        settings(tmp_path, tree=str(path), num_prompt_tokens=2).choose(None)
    deep = TreePolicy((SparseTree((0,), (0,), (3, 3)), *policy.trees[1:]))
    deep.save(path)
    with pytest.raises(TreeError, match="only 0 prompt rows are there"):
        settings(tmp_path, tree=str(path)).choose(None)
    # The bigram table reaches deeper.
    settings(tmp_path, tree=str(path), bigram=True).choose(None)


def test_steps_of_fixed_rows_do_not_go_by_context(tmp_path):
    policy = TreePolicy((chain_tree(0, (3,)), *[chain_tree(1, (3, 3))] * 3))
    off, on = TreePlan((Tier(None),)), TreePlan((Tier(None, (policy,)),))
    plan = TreePlan.by_context([(512, off), (None, on)])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_dict()))
    usual = settings(tmp_path, tree=str(file), bigram=True)
    assert usual.given_plan() == plan
    with pytest.raises(PPDConfigError, match="tells contexts apart"):
        dataclasses.replace(usual, fixed_rows=True).given_plan()


def test_the_machine_decides(tmp_path):
    # A device that waits for its memory speculates with all rows at low load.
    plan, tiers = settings(tmp_path).choose(None)
    assert plan.tiers[0].policies
    assert tiers[0].gain > 1.5
    assert max(tree.num_rows for tree in plan.trees) == 16
    # On one where every row costs as much as a step nothing pays, at any load.
    rows = (1, 2, 4, 8, 16)
    slow = LatencyProfile((1,), rows, (tuple(map(float, rows)),), {})
    plan, tiers = settings(tmp_path, ngram=False).choose(slow)
    assert [tier.policies for tier in plan.tiers] == [()]
    assert not tiers[0].speculates
