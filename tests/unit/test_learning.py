"""Learning from traffic: seeded streams of walks, and the search beside them."""

import numpy as np
import pytest

from vllm_ppd.adaptive import replan
from vllm_ppd.adaptive.learning import EvidenceLearner
from vllm_ppd.adaptive.replan import Replanner, SearchPace, better_plan
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.fixed_rows import better_within
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.plan_search import best_plan
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk

ROWS = (1, 2, 4, 8, 16)
PROFILE = LatencyProfile((1, 2), ROWS, ((1.0, 1.1, 1.2, 1.4, 2.0),) * 2, {})


def acceptance(scale: float, chain: float) -> AcceptanceModel:
    prompted = scale * np.array([[0.4, 0.2, 0.1], [0.3, 0.15, 0.1]])
    return AcceptanceModel(
        prompted,
        scale * np.array([0.2, 0.1, 0.05]),
        np.full((1, 5), chain),
        np.array([0.5 * prompted]),
        np.array([[[0.6, 0.4], [0.5, 0.5]]] * 2),
        np.concatenate([prompted, [[0.2, 0.1, 0.05]]]),
    )


def stream(truth: AcceptanceModel, learner: EvidenceLearner, steps: int) -> None:
    """Walks of a policy's trees in a world where `truth` holds."""
    found = best_policy(acceptance(1.0, 0.6), LatencyCurve.constant(), 14)
    plan = TreePlan((found.tier(None),))
    tables = TreeTables(plan, 1000)
    rng = np.random.default_rng(0)
    batch = 40
    for _ in range(steps):
        classes, states = rng.integers(0, 2, batch), rng.integers(0, 3, batch)
        trees = 1 + classes * 3 + states
        counts = tables.num_rows[trees]
        step = TreeStep(tables, trees, np.cumsum(counts) - counts, counts)
        # Every node has its own token, so that the target can pick any child.
        tokens = np.arange(len(step.node_rows))
        walk = TreeWalk(step, tokens)
        going_on = True
        while going_on:
            picked = np.full(batch, -5)
            for b in np.flatnonzero(walk.active):
                node = int(walk.nodes[b])
                parents = tables.parents[trees[b], : step.num_nodes[b]]
                on = bool(tables.on_ngram[trees[b], node])
                depth = int(tables.node_depths[trees[b], node]) + 1
                chances = truth.chances(states[b], classes[b], depth, on)
                draw = rng.random()
                for child in np.flatnonzero(parents == node):
                    draw -= chances[tables.node_ranks[trees[b], child]]
                    if draw < 0:
                        picked[b] = tokens[step.first_nodes[b] + child]
                        break
            going_on = walk.descend(picked)
        learner.observe_walk(step, walk, states, classes)
        accepted = walk.lengths > 1
        # On after a step that accepted, else to nowhere in particular.
        after = np.where(accepted, 1, rng.integers(0, 2, batch))
        learner.observe_moves(classes, after, accepted)


def test_counts_converge_to_what_happens():
    truth, prior = acceptance(0.5, 0.3), acceptance(1.0, 0.9)
    learner = EvidenceLearner(prior)
    stream(truth, learner, 250)
    found = learner.acceptance()
    np.testing.assert_allclose(found.prompted[:, 0], truth.prompted[:, 0], atol=0.03)
    np.testing.assert_allclose(found.chain[0, :2], truth.chain[0, :2], atol=0.05)
    beside, other = found.beside[0, 0, 0], prior.beside[0, 0, 0]
    assert abs(beside - truth.beside[0, 0, 0]) < abs(beside - other)
    np.testing.assert_allclose(found.moves[0], 0.5, atol=0.03)
    np.testing.assert_allclose(found.moves[1], [[0, 1]] * 2, atol=0.03)
    # What never happened stays as it was known; and it is all still probabilities.
    assert found.unprompted[2] == pytest.approx(prior.unprompted[2], abs=0.03)


def test_a_source_that_changed_is_believed_in_all_its_ranks():
    truth, prior = acceptance(0.5, 0.3), acceptance(1.0, 0.9)
    learner = EvidenceLearner(prior)
    stream(truth, learner, 10)
    found = learner.acceptance()
    # 400 steps say little about each chance, and enough about prompt rows together.
    off = np.abs(np.log(found.prompted / truth.prompted))
    assert (
        off.mean()
        < 0.4
        < np.log(2)
        == pytest.approx(np.abs(np.log(prior.prompted / truth.prompted)).mean())
    )
    # Candidates that were never tried went along with those of their source.
    assert (found.chain[0] < 0.7).all()


def test_the_same_stream_gives_the_same_evidence():
    first, second = (EvidenceLearner(acceptance(1.0, 0.9)) for _ in range(2))
    stream(acceptance(0.5, 0.3), first, 3)
    stream(acceptance(0.5, 0.3), second, 3)
    assert first.acceptance().to_dict() == second.acceptance().to_dict()


def test_chains_are_checked_without_speculating():
    learner = EvidenceLearner(acceptance(1.0, 0.9))
    for _ in range(300):
        learner.observe_chain(1, np.array([5, 6, 7]), np.array([5, 9, 7]))
    chain = learner.acceptance().chain[0]
    assert chain[0] > 0.9
    assert chain[1] < 0.2
    # Never put to the test: between what was known and what its source did elsewhere.
    assert 0.45 < chain[2] < 0.7


def test_counts_made_elsewhere_are_as_good():
    here, there = (EvidenceLearner(acceptance(1.0, 0.9)) for _ in range(2))
    stream(acceptance(0.5, 0.3), here, 3)
    for part in (0.5, 0.5):
        sums = (part * counts for counts in (here._tries, here._hits, here._moves))
        there.observe_sums(*sums, 3.5)
    assert there.acceptance().to_dict() == here.acceptance().to_dict()
    assert there.observations == 7.0


def test_old_counts_fade():
    learner = EvidenceLearner(acceptance(1.0, 0.5))
    for _ in range(200):
        learner.observe_chain(1, np.array([5]), np.array([5]))
    for _ in range(20):
        learner.forget()
    assert learner.observations == 0
    assert learner.acceptance().chain[0, 0] == pytest.approx(0.5, abs=0.03)


def test_a_plan_changes_only_when_it_pays():
    limits = {"max_rows": 16, "num_ept": 1, "max_requests": 2}
    known = acceptance(1.0, 0.9)
    plan, _ = best_plan(known, PROFILE, **limits)
    assert better_plan(known, PROFILE, plan, **limits) is None
    changed = better_plan(acceptance(0.5, 0.1), PROFILE, plan, **limits)
    assert changed is not None and changed != plan
    # From no speculation back to some.
    off = TreePlan((Tier(None),))
    assert better_plan(known, PROFILE, off, **limits) == plan


def test_only_tiers_in_use_are_searched():
    profile = LatencyProfile((1, 8), ROWS, (PROFILE.seconds[0],) * 2, {})
    limits = {"max_rows": 16, "max_requests": 8}
    known, changed = acceptance(1.0, 0.9), acceptance(0.7, 0.4)
    plan, _ = best_plan(known, profile, **limits)
    new, tiers = best_plan(
        changed, profile, **limits, current=plan, loads=((3, 1), (4, 1))
    )
    assert [tier.requests for tier in tiers] == [4]
    every, _ = best_plan(changed, profile, **limits)
    for load, expected in ((1, plan), (2, plan), (3, every), (4, every), (8, plan)):
        policies = new.tiers[new.tier_index(load)].policies
        assert policies == expected.tiers[expected.tier_index(load)].policies
    # What follows for loads that were not searched: none above, some below.
    nothing, _ = best_plan(
        acceptance(0.01, 0.01), profile, **limits, current=plan, loads=[(4, 1)]
    )
    for load in (1, 2):
        kept = nothing.tiers[nothing.tier_index(load)]
        assert kept.policies == plan.tiers[plan.tier_index(load)].policies
    assert not any(nothing.tiers[nothing.tier_index(n)].policies for n in (3, 8, 99))
    off = TreePlan((Tier(None),))
    back, _ = best_plan(known, profile, **limits, current=off, loads=[(2, 1)])
    assert back.tiers[back.tier_index(1)].policies
    assert back.tiers[0].max_requests == 2 and not back.tiers[1].policies
    # Loads beyond all tiers belong to the last one.
    limits = {"max_rows": 4, "max_requests": 256}
    _, tiers = best_plan(known, profile, **limits, current=off, loads=[(200, 1)])
    assert [tier.requests for tier in tiers] == [128]


def test_the_search_runs_in_a_process_of_its_own():
    limits = {"max_rows": 8, "num_ept": 1, "max_requests": 1}
    known = acceptance(1.0, 0.9)
    plan, _ = best_plan(known, PROFILE, **limits)
    replanner = Replanner()
    assert replanner.take() is None
    replanner.submit(known, PROFILE, TreePlan((Tier(None),)), **limits)
    assert replanner.busy
    assert replanner.take(wait=True) == plan
    replanner.submit(known, PROFILE, plan, **limits)
    assert replanner.take(wait=True) is None
    assert not replanner.busy
    # Within fixed rows, which needs no profile.
    rows = [plan.max_rows]
    other = acceptance(0.2, 0.1)
    replanner.submit(other, None, plan, num_ept=1, rows=rows)
    expected = better_within(other, plan, rows, 1, 1.03)
    assert expected is not None and replanner.take(wait=True) == expected
    # A search that cannot succeed is no disaster.
    replanner.submit(known, PROFILE, plan, max_rows=8, num_ept=1, max_requests=-1)
    replanner.close()
    assert not replanner.busy


def test_searches_grow_rare_and_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(replan.time, "monotonic", lambda: now[0])
    pace, together = SearchPace(by_clock=True), SearchPace(by_clock=False)
    assert pace.due(1000.0) and not pace.due(999.0)
    for one in (pace, together):
        one.begun()
    now[0] = 2.0
    for one in (pace, together):
        one.ended()
    # Thirty times the two seconds that the search took.
    now[0] = 61.9
    assert not pace.due(1e9) and together.due(2000.0) and not together.due(1999.0)
    now[0] = 62.0
    assert pace.due(2000.0) and not pace.due(1999.0)
    for _ in range(20):
        pace.begun()
        now[0] += 1.0
        pace.ended()
    # In the long run a hundred times.
    now[0] += 99.9
    assert not pace.due(1e9)
    now[0] += 0.1
    assert pace.due(50_000.0) and not pace.due(49_999.0)
