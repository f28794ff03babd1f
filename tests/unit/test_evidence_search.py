"""The search over several sources of guesses, against brute force and simulation."""

import itertools
import json

import numpy as np
import pytest

from vllm_ppd.search.acceptance import AcceptanceModel, MeasurementError
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.plan_search import best_plan, shared_curve
from vllm_ppd.search.policy_iteration import best_policy, node_chances, policy_value
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.search.subtrees import useful_rows
from vllm_ppd.search.tree_dp import TypedTrees, candidates_by_depth, most_tokens
from vllm_ppd.search.tree_search import optimal_policy
from vllm_ppd.trees.plain_tree import PlainTree

CURVE = LatencyCurve((1, 2, 4, 8, 16), (1.0, 1.2, 1.3, 1.6, 2.4))


def some_evidence(
    seed: int, m: int = 1, ranks: int = 2, classes: int = 1
) -> AcceptanceModel:
    rng = np.random.default_rng(seed)

    def falling(*shape):
        return np.sort(rng.random(shape) / shape[-1], axis=-1)[..., ::-1]

    moves = rng.random((2, classes + 1, classes + 1)) + 0.1
    return AcceptanceModel(
        falling(m, ranks),
        falling(ranks) / 2,
        rng.random((classes, 2)) * 0.9,
        falling(classes, m, ranks) / 2,
        moves / moves.sum(axis=2, keepdims=True),
        falling(m + 1, ranks),
    )


@pytest.mark.parametrize("rows", [2, 4, 9, 24])
@pytest.mark.parametrize("latency", [LatencyCurve.constant(), CURVE])
def test_prompt_rows_alone_give_the_policy_of_tree_search(rows, latency):
    rng = np.random.default_rng(rows)
    table = np.sort(rng.random((3, 5)) / 5, axis=1)[:, ::-1]
    stats = AcceptanceStats(table)
    known = optimal_policy(stats, latency, rows)
    found = best_policy(AcceptanceModel.of(stats), latency, rows)
    # Starting anew once in 10,000 steps costs next to nothing.
    assert found.tau == pytest.approx(known.tau, rel=2e-4)
    assert found.tokens_per_second == pytest.approx(known.tokens_per_second, rel=2e-4)


def all_trees(rows: int, max_prompts: int, ranks: int, depth: int):
    """Every tree of at most `rows` rows."""

    def grow(parents, ranks_used, prompts):
        yield PlainTree(parents, ranks_used, prompts)
        used = 1 + len(parents) + sum(prompts)
        depths = [0]
        for parent in parents:
            depths.append(depths[parent] + 1)
        last = (parents[-1], ranks_used[-1]) if parents else (-1, -1)
        for parent in range(len(depths)):
            for rank in range(ranks):
                # Children in order of (parent, rank), so that no tree comes twice.
                if depths[parent] == depth or (parent, rank) <= last:
                    continue
                for count in range(max_prompts + 1):
                    if used + 1 + count <= rows:
                        yield from grow(
                            (*parents, parent), (*ranks_used, rank), (*prompts, count)
                        )

    for root in range(min(max_prompts, rows - 1) + 1):
        yield from grow((), (), (root,))


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_is_better(seed):
    acceptance = some_evidence(seed)
    rows = 4
    found = best_policy(acceptance, CURVE, rows)
    choices = list(all_trees(rows, 1, 3, 3))
    # In turn the best tree of each state while the others stay: if none can improve,
    # the policy is optimal (policy iteration).
    best = found.tokens_per_second
    for match_class, state in itertools.product(range(2), range(2)):
        for tree in choices:
            trees = [list(row) for row in found.trees]
            trees[match_class][state] = tree
            _, speed, _ = policy_value(trees, acceptance, CURVE)
            assert speed <= best * (1 + 1e-7)


def worth(tree, acceptance, state, match_class, ahead):
    """In tokens, after the first, of a tree and of where walks through it end."""
    reached = node_chances(tree, acceptance, state, match_class)
    ends = reached.copy()
    for node, parent in enumerate(tree.parents, start=1):
        ends[parent] -= reached[node]
    after = [
        ahead[min(node, 1), match_class, count]
        for node, count in enumerate(tree.prompts)
    ]
    return reached[1:].sum() + ends @ np.array(after)


@pytest.mark.parametrize("seed", range(3))
def test_no_tree_of_as_many_rows_is_worth_more(seed):
    acceptance = some_evidence(seed, m=1 + seed % 2)
    m, rows = acceptance.num_prompt_tokens, 4
    ahead = np.random.default_rng(seed).normal(size=(2, 2, m + 1))
    best = TypedTrees(candidates_by_depth(acceptance), ahead, rows, 1)
    choices = list(all_trees(rows, m, 3, 3))
    for match_class, state in itertools.product(range(2), range(m + 1)):
        where = acceptance, state, match_class, ahead
        worths = [worth(tree, *where) for tree in choices]
        for most in range(1, rows + 1):
            fitting = (
                each
                for each, tree in zip(worths, choices, strict=True)
                if tree.num_rows <= most
            )
            value = best.values[match_class, state, most]
            assert value == pytest.approx(max(fitting))
            assert worth(best.tree(match_class, state, most), *where) == (
                pytest.approx(value)
            )


@pytest.mark.parametrize("num_ept", [1, 3])
@pytest.mark.parametrize("classes", [0, 2])
def test_large_trees_are_worth_what_was_found(num_ept, classes):
    acceptance = some_evidence(5, m=3, ranks=6, classes=classes)
    ahead = np.random.default_rng(classes).random((2, classes + 1, 4))
    best = TypedTrees(candidates_by_depth(acceptance), ahead, 60, num_ept)
    assert (np.diff(best.values[..., 1:]) >= 0).all()
    for match_class, state in itertools.product(range(classes + 1), range(4)):
        for rows in (1, 17, 60):
            tree = best.tree(match_class, state, rows)
            assert tree.num_rows <= rows
            value = best.values[match_class, state, rows]
            assert worth(tree, acceptance, state, match_class, ahead) == (
                pytest.approx(value)
            )


def test_rows_that_cannot_pay_are_not_tried():
    acceptance = some_evidence(2, m=2, ranks=4, classes=2)
    candidates = candidates_by_depth(acceptance)
    most = most_tokens(acceptance, candidates)
    # With rows for every candidate, these are the tokens of the largest trees.
    all_rows = TypedTrees(candidates, np.zeros((2, 3, 3)), 1500, 1)
    np.testing.assert_allclose(1 + all_rows.values[..., -1], most)
    seconds = np.array([1.0, 2.0, 3.0, 4.0])
    # A step may bring 1 token more where h is 1 less than elsewhere.
    assert useful_rows(np.array([2.0, 2.0]), np.array([0.0, 1.0]), 1.0, seconds) == 3
    assert useful_rows(np.array([2.0, 2.0]), np.array([0.0, 0.0]), 5.0, seconds) == 1
    assert useful_rows(np.array([2.0, 2.0]), np.array([0.0, 0.0]), 0.1, seconds) == 4


def test_the_value_is_what_a_simulation_gives():
    acceptance = some_evidence(7, m=2, ranks=3, classes=2)
    found = best_policy(acceptance, LatencyCurve.constant(), 8)
    rng = np.random.default_rng(0)
    state = match_class = 0
    tokens, steps = 0, 60_000
    for _ in range(steps):
        tree = found.trees[match_class][state]
        chances = node_chances(tree, acceptance, state, match_class)
        node = 0
        while True:
            tokens += 1
            children = [c for c, p in enumerate(tree.parents, 1) if p == node]
            draw = rng.random() * chances[node]
            for child in children:
                draw -= chances[child]
                if draw < 0:
                    node = child
                    break
            else:
                break
        state = tree.prompts[node]
        match_class = rng.choice(3, p=acceptance.moves[int(node > 0), match_class])
    assert tokens / steps == pytest.approx(found.tau, rel=0.01)


def test_the_chain_goes_deeper_than_prompt_rows():
    acceptance = AcceptanceModel(
        np.array([[0.3, 0.1]]),
        np.zeros(2),
        np.full((1, 6), 0.9),
        np.array([[[0.1, 0.05]]]),
        np.full((2, 2, 2), 0.5),
        np.array([[0.4, 0.1], [0.0, 0.0]]),
    )
    found = best_policy(acceptance, LatencyCurve.constant(), 8)
    assert max(found.tier(None).policies[1].trees[0].node_depths) == 6
    assert max(found.tier(None).policies[0].trees[1].node_depths) == 1
    chances = node_chances(found.trees[1][0], acceptance, 0, 1)
    assert chances[:4] == pytest.approx([1, 0.9, 0.81, 0.729])


def test_what_speculation_costs_decides_the_tiers():
    acceptance = some_evidence(1, m=2, ranks=3)
    rows = (1, 2, 4, 8)
    table = ((1.0, 1.1, 1.2, 1.3), (1.2, 1.21, 1.23, 1.4), (2.0, 6.0, 10.0, 20.0))
    profile = LatencyProfile((1, 2, 4), rows, table, {})
    plan, tiers = best_plan(acceptance, profile, 8, max_requests=64)
    assert [tier.requests for tier in tiers] == [1, 2, 4]
    assert plan.tiers[-1].policies == ()
    assert tiers[0].found.mean_rows > tiers[2].found.mean_rows
    assert plan.tiers[0].policies


def test_looking_for_guesses_has_to_pay_too():
    """DraftInputs are made in few states, and every other step is a little longer."""
    acceptance, rows = some_evidence(1, m=2, ranks=3), (1, 2, 4, 8)
    table = ((1.0, 1.2, 1.6, 2.4),)
    gains = []
    for bare in ((), (1.05,), (1.15,)):
        profile = LatencyProfile((1,), rows, table, {}, bare=bare)
        _, (tier,) = best_plan(acceptance, profile, 8, max_requests=1)
        gains.append(tier.gain)
        value = policy_value(tier.found.trees, acceptance, profile.curve(1))[1]
        assert tier.gain == pytest.approx(value)
    assert gains[0] > gains[1] > gains[2]


def test_requests_share_what_guessing_costs():
    """A jump from one row to two is paid by every request of a step with guesses."""
    curve = LatencyCurve((1, 2, 4, 8), (1.0, 2.0, 2.2, 2.6))
    shared = shared_curve(curve, 0.5, 4.0)
    # Half of the way from 1.0 to where the line through 2.0 and 2.2 meets one row.
    assert shared(1) == pytest.approx(1.45)
    assert shared(4) == pytest.approx(2.2)
    # If a request has more rows than the others, the step is not so much longer.
    assert shared(8) - shared(4) == pytest.approx(shared(4) - shared(1), rel=0.34)
    acceptance = some_evidence(1, m=2, ranks=3, classes=2)
    rows = (1, 2, 4, 8)
    profile = LatencyProfile((1, 8), rows, ((1.0, 2.0, 2.2, 2.6),) * 2, {})
    _, tiers = best_plan(acceptance, profile, 8, max_requests=8)
    # The same curve at either load: only what is shared differs, and the mean rows
    # of all cost what the curve says.
    for tier in tiers[1:]:
        assert tier.gain <= tiers[0].gain
        expected = tier.found.tau / profile.curve(8)(round(tier.found.mean_rows))
        assert tier.found.tokens_per_second == pytest.approx(expected, rel=0.08)


def test_the_servers_own_limit_ends_the_tiers():
    profile = LatencyProfile((1,), (1, 8), ((1.0, 1.0),), {})
    plan, tiers = best_plan(some_evidence(1), profile, 4, max_requests=3)
    assert [tier.requests for tier in tiers] == [1, 2, 4]
    assert plan.tiers[-1].max_requests is None


def test_files_and_bad_values(tmp_path):
    acceptance = some_evidence(3, m=2, ranks=3, classes=2)
    acceptance.save(tmp_path / "acceptance.json")
    read = AcceptanceModel.load(tmp_path / "acceptance.json")
    np.testing.assert_array_equal(read.beside, acceptance.beside)
    np.testing.assert_array_equal(read.moves, acceptance.moves)
    alone = acceptance.without_chains()
    alone.save(tmp_path / "acceptance.json")
    assert AcceptanceModel.load(tmp_path / "acceptance.json").num_classes == 1
    with pytest.raises(MeasurementError, match="cannot be read"):
        AcceptanceModel.load(tmp_path / "nothing.json")
    (tmp_path / "acceptance.json").write_text("[]")
    with pytest.raises(MeasurementError, match="no file of acceptance"):
        AcceptanceModel.load(tmp_path / "acceptance.json")
    good = acceptance.to_dict()
    bad = AcceptanceModel.load
    for name, value, message in (
        ("chain", [[1.5, 0.2], [0.1, 0.1]], "chain holds values outside"),
        ("unprompted", [0.1], "unprompted has shape"),
        ("moves", [[1, 1], [0, 1]], "expected"),
        ("format_version", 1, "expected 'ppd_evidence' 2"),
    ):
        (tmp_path / "acceptance.json").write_text(json.dumps({**good, name: value}))
        with pytest.raises(MeasurementError, match=message):
            bad(tmp_path / "acceptance.json")
