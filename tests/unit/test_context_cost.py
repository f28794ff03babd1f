"""What long contexts cost, and plans that tell them apart."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.test_evidence_search import some_evidence
from vllm_ppd.adaptive.context_cost import (
    ContextBand,
    ContextCost,
    ContextSample,
    context_bands,
)
from vllm_ppd.adaptive.replan import better_plan
from vllm_ppd.adaptive.step_timing import StepTiming, corrected
from vllm_ppd.search.plan_search import best_plan
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan

# A second for a plain step and as much again for three more rows: too dear for guesses.
ROWS = (1, 2, 4, 8)
SECONDS = ((1.0, 1.4, 2.0, 3.4), (1.0, 1.4, 2.0, 3.4))
# Four thousand tokens more take nine seconds, whatever the rows.
COST = ContextCost(128, 0.0023, 0.0023, 0.0)
PROFILE = LatencyProfile((1, 8), ROWS, SECONDS, {}, COST)
LIMITS = {"max_rows": 8, "max_requests": 2}
EVIDENCE = some_evidence(1)


def test_the_cost_is_found_in_exact_times():
    known = ContextCost(128, 3e-6, 4e-6, 0.5e-6)
    samples = [
        ContextSample(n, q, float(known.added([n], [q], 129)[0, 0]))
        for n in (1, 8)
        for q in (1, 4, 16)
    ]
    found = ContextCost.fitted(128, samples)
    assert found.to_dict() == pytest.approx(known.to_dict())
    assert known.added((1, 2), (1, 4), 1128) == pytest.approx(
        np.array([[3e-3, 6e-3], [6e-3, 12e-3]])
    )
    assert (known.added((1,), (1, 4), 100) == 0).all()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # More rows looked faster: nothing per row.
        ((1.0, 3.0, 2.0), (1.0, 0.0)),
        # Many rows cost out of proportion: all of it per row.
        ((1.0, 1.0, 40.0), (0.0, 1.0)),
        ((-1.0, -1.0, -1.0), (0.0, 0.0)),
    ],
)
def test_noise_never_makes_contexts_cheaper_than_nothing(seconds, expected):
    samples = [
        ContextSample(1, rows, each)
        for rows, each in zip((1, 4, 16), seconds, strict=True)
    ]
    found = ContextCost.fitted(128, samples)
    assert found.plain == max(0.0, seconds[0])
    assert [found.tree > 0, found.row > 0] == [bool(each) for each in expected]


@pytest.mark.parametrize("name", ["plain", "tree", "row"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_costs_that_no_machine_has(name, value):
    with pytest.raises(ValueError, match=name):
        ContextCost(**{**COST.to_dict(), name: value})


def test_ranges_end_where_the_model_does():
    assert context_bands(None, 9999) == [ContextBand(None, 1)]
    assert context_bands(COST, 512) == [ContextBand(None, 1)]
    assert context_bands(COST, 600) == [ContextBand(512, 1), ContextBand(None, 600)]
    assert context_bands(COST, 1 << 20) == [
        ContextBand(512, 1),
        ContextBand(2048, 1024),
        ContextBand(8192, 4096),
        ContextBand(None, 16384),
    ]


def test_a_profile_at_another_context():
    assert PROFILE.at_context(100) is PROFILE
    there = PROFILE.at_context(1128)
    assert there.curve(1)(np.array(ROWS)) == pytest.approx(np.array(SECONDS[0]) + 2.3)
    assert there.curve(8)(np.array(ROWS)) == pytest.approx(
        np.array(SECONDS[1]) + 8 * 2.3
    )
    # In two steps it is the same.
    again = PROFILE.at_context(600).at_context(1128)
    assert np.array(again.seconds) == pytest.approx(np.array(there.seconds))
    unknown = LatencyProfile((1, 8), ROWS, SECONDS, {})
    assert unknown.at_context(5000) is unknown
    assert LatencyProfile.from_dict(PROFILE.to_dict()) == PROFILE


def test_a_plan_by_context():
    tier = best_plan(EVIDENCE, PROFILE, 8, max_requests=1, max_context=9000)[0].tiers[
        -1
    ]
    off, on = TreePlan((Tier(None),)), TreePlan((Tier(None, tier.policies),))
    plan = TreePlan.by_context([(512, off), (2048, on), (None, on)])
    assert plan.tiers == (Tier(None, (), 512), Tier(None, tier.policies))
    assert [plan.tier_index(7, n) for n in (1, 512, 513, 9999)] == [0, 0, 1, 1]
    assert plan.at_context(512) == off and plan.at_context(513) == on
    assert plan.at_context(1) == off and on.at_context(1) == on
    assert TreePlan.from_dict(plan.to_dict()) == plan
    assert plan.first_trees == (0, 1)


def test_where_contexts_make_steps_long_guesses_pay():
    plan, planned = best_plan(EVIDENCE, PROFILE, **LIMITS, max_context=4096)
    assert not plan.at_context(128).speculating
    assert plan.at_context(4000).speculating
    gains = {(p.context, p.requests): p.gain for p in planned if p.speculates}
    # Longer ones have the same trees: their own would be hardly better.
    assert set(gains) == {(1024, 1), (1024, 2)}
    assert plan.at_context(4000) == plan.at_context(513)
    # The same as a search with those times alone.
    alone, _ = best_plan(EVIDENCE, PROFILE.at_context(1024), **LIMITS)
    assert plan.at_context(1024) == alone
    # A server whose requests never get there has one range.
    short, _ = best_plan(EVIDENCE, PROFILE, **LIMITS, max_context=512)
    assert short == plan.at_context(1)


def test_contexts_that_change_nothing_share_their_trees():
    # Everything takes longer in proportion.
    cheap = LatencyProfile((1, 8), ROWS, ((1.0, 1.01, 1.02, 1.03),) * 2, {}, COST)
    plan, planned = best_plan(EVIDENCE, cheap, **LIMITS, max_context=1 << 20)
    assert plan == plan.at_context(1)
    assert {each.context for each in planned} == {1}


def test_only_contexts_in_use_are_searched():
    plan, _ = best_plan(EVIDENCE, PROFILE, **LIMITS, max_context=4096)
    options = {**LIMITS, "max_context": 4096}
    off = TreePlan((Tier(None),))
    new, planned = best_plan(
        EVIDENCE, PROFILE, **options, current=off, loads=[(1, 4000)]
    )
    assert {each.context for each in planned} == {4096}
    assert new.at_context(128) == off.at_context(128)
    assert new.at_context(4000).tiers[0].policies
    changed = better_plan(
        EVIDENCE, PROFILE, off, num_ept=1, **options, loads=[(1, 4000)]
    )
    assert changed == new
    assert (
        better_plan(EVIDENCE, PROFILE, plan, num_ept=1, **options, loads=[(1, 4000)])
        is None
    )


def test_times_of_long_contexts_correct_what_is_expected_there():
    # Exactly as the profile has it, for requests of 1128 tokens.
    plain, guessing = (PROFILE.at_context(1128).curve(1)(n) for n in (1, 4))
    timing = StepTiming(1, ((4.0, 48),), plain, guessing, context=1128)
    found = corrected(PROFILE, [timing] * 9)
    assert np.array(found.seconds) == pytest.approx(np.array(SECONDS))
    assert found.context_cost == COST
    twice = timing._replace(plain_s=2 * plain, guessing_s=2 * guessing)
    found = corrected(PROFILE, [twice] * 9)
    assert found.seconds[0][0] == pytest.approx(2.0)
