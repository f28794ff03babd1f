"""Plans for steps in which every request has as many rows, against brute force."""

import itertools

import numpy as np
import pytest

from tests.unit.test_evidence_search import all_trees, some_evidence
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.fixed_rows import best_fixed_plan, best_within, better_within
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.plan_search import tier_limits
from vllm_ppd.search.policy_iteration import policy_value
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.search.report import load_figures
from vllm_ppd.trees.menu import Tier, TreePlan

# One prompt token with one guess, right in six of ten steps.
ONE = AcceptanceModel.of(AcceptanceStats(np.array([[0.6]])))


def test_tokens_per_step_by_rows():
    found = best_within(ONE, (4, 2, 3), 1)
    # Two rows: a prompt row, then in the next step its guess. Three: the guess has a
    # prompt row, which is of use where it is right. Four: the root has one as well.
    assert {rows: policy.tau for rows, policy in found.items()} == pytest.approx(
        {2: (1 + 1.6) / 2, 3: 1 + 0.6 / 1.4, 4: 1.6}, rel=2e-4
    )
    assert [found[rows].max_rows for rows in (2, 3, 4)] == [2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_no_trees_are_better(seed):
    table = np.sort(np.random.default_rng(seed).random((1, 2)) / 2)[:, ::-1]
    acceptance = AcceptanceModel.of(AcceptanceStats(table))
    curve = LatencyCurve((1, 2, 3, 4, 5), (1.0, 1.05, 1.15, 1.2, 1.6))
    profile = LatencyProfile((1,), curve.rows, (curve.seconds,), {})
    best = dict.fromkeys(range(1, 6), 0.0)
    for pair in itertools.product(all_trees(5, 1, 2, 1), repeat=2):
        tau, _, _ = policy_value([pair], acceptance, LatencyCurve.constant())
        rows = max(tree.num_rows for tree in pair)
        best[rows] = max(best[rows], tau)
    for rows, policy in best_within(acceptance, (2, 3, 4, 5), 1).items():
        most = max(tau for count, tau in best.items() if count <= rows)
        assert policy.tau == pytest.approx(most, rel=1e-7)
    _, (tier,) = best_fixed_plan(acceptance, profile, 5, 1, 1, measured=False)
    fastest = max(tau / curve(rows) for rows, tau in best.items())
    assert max(tier.gain, 1.0) == pytest.approx(max(fastest, 1.0), rel=1e-7)


def test_each_load_has_its_rows():
    rows = (1, 2, 3, 4)
    table = ((1.0, 1.0, 1.05, 1.3), (1.0, 1.1, 1.3, 1.6))
    profile = LatencyProfile((1, 2), rows, table, {})
    plan, tiers = best_fixed_plan(ONE, profile, 4, 1, 2, measured=True)
    assert [tier.found.max_rows for tier in tiers] == [3, 2]
    assert [tier.gain for tier in tiers] == pytest.approx(
        [(1 + 0.6 / 1.4) / 1.05, 1.3 / 1.1], rel=2e-4
    )
    assert [(t.max_requests, t.policies[0].max_rows) for t in plan.tiers] == [
        *((1, 3), (None, 2)),
    ]
    # Where nobody compares speeds, a shared step has to promise more.
    plan, tiers = best_fixed_plan(ONE, profile, 4, 1, 2, measured=False)
    assert [tier.speculates for tier in tiers] == [True, False]
    assert plan.tiers[-1].policies == ()


def test_rows_without_use_are_not_paid():
    """Four rows hold all that this acceptance can guess, however many may be had."""
    profile = LatencyProfile((1,), (1, 4, 64), ((1.0, 1.1, 9.0),), {})
    plan, (tier,) = best_fixed_plan(ONE, profile, 64, 1, 1, measured=False)
    assert plan.max_rows == 4
    assert tier.gain == pytest.approx(1.6 / 1.1, rel=2e-4)


def test_prompt_tokens_of_several_rows():
    # A prompt token takes three rows: none fits beside the root in two or three.
    found = best_within(ONE, (3, 4), 3)
    assert found[3].tau == pytest.approx(1.0, abs=1e-6)
    assert found[4].tau == pytest.approx(1.3, rel=2e-4)
    # No prompt token fits, so nothing is guessed.
    profile = LatencyProfile((1,), (1, 3), ((1.0, 1.0),), {})
    plan, _ = best_fixed_plan(ONE, profile, 3, 3, 1, measured=True)
    assert plan.tiers[0].policies == ()


def test_figures_are_those_of_the_search():
    acceptance = some_evidence(5, m=2, ranks=3, classes=2)
    table = ((1.0, 1.02, 1.1, 1.3), (1.0, 1.05, 1.3, 2.0))
    profile = LatencyProfile((1, 8), (1, 2, 4, 8), table, {})
    plan, tiers = best_fixed_plan(acceptance, profile, 8, 1, 8, measured=True)
    assert [tier.requests for tier in tiers if tier.speculates][:3] == [1, 2, 4]
    for tier in tiers:
        if not tier.speculates:
            continue
        found = load_figures(plan, acceptance, profile, tier.requests, fixed_rows=True)
        assert found.tau == pytest.approx(tier.found.tau, rel=1e-6)
        assert found.gain == pytest.approx(tier.gain, rel=1e-6)
        # A step has the rows of the largest tree, whichever is run.
        curve = profile.curve(tier.requests)
        assert found.seconds == pytest.approx(curve(tier.found.max_rows))


def test_loads_that_are_told_apart():
    assert tier_limits(1) == [1]
    assert tier_limits(3) == [1, 2, 4]
    assert tier_limits(500) == [1, 2, 4, 8, 16, 32, 64, 128]


def test_better_trees_in_the_same_rows():
    known = some_evidence(5, m=2, ranks=3, classes=1)
    large, small = (best_within(known, (8, 3), 1)[rows] for rows in (8, 3))
    plan = TreePlan((large.tier(1), small.tier(4), Tier(None)))
    assert better_within(known, plan, (8, 3, 1), 1, least_gain=1.03) is None
    other = some_evidence(10, m=2, ranks=3, classes=1)
    found = better_within(other, plan, (8, 3, 1), 1, least_gain=1.03)
    assert found is not None
    assert [tier.max_requests for tier in found.tiers] == [1, 4, None]
    best = best_within(other, (8, 3), 1)
    constant = LatencyCurve.constant()
    changed = 0
    for index, rows in enumerate((8, 3)):
        before, after = plan.tiers[index], found.tiers[index]
        had, has = (
            policy_value([p.trees for p in tier.policies], other, constant)[0]
            for tier in (before, after)
        )
        assert max(policy.max_rows for policy in after.policies) <= rows
        if after != before:
            changed += 1
            assert has == pytest.approx(best[rows].tau) and has >= 1.03 * had
        else:
            assert best[rows].tau < 1.03 * had
    assert changed
    # A tier without guesses has no rows for any.
    assert found.tiers[2].policies == ()
    # Rows that the served trees leave over may come to be used.
    wider = better_within(known, plan, (8, 8, 1), 1, least_gain=1.0001)
    assert wider is not None and wider.tiers[1].policies == large.tier(4).policies
