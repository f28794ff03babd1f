"""The search against brute force, simulation and the published figures."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.baseline_policies import (
    BaselineKind,
    baseline_trees,
    chain_policy,
    full_policy,
    paper_policy,
    random_policy,
)
from vllm_ppd.search.defaults import typical_acceptance
from vllm_ppd.search.latency import LatencyCurve, MeasurementError
from vllm_ppd.search.tree_growth import BestTrees
from vllm_ppd.search.tree_search import SearchError, evaluate, optimal_policy
from vllm_ppd.trees.plain_tree import PlainTree, path_probabilities
from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy, chain_tree

CONSTANT = LatencyCurve.constant()
PUBLISHED = json.loads(
    (Path(__file__).parent / "data" / "published_acceptance.json").read_text()
)
KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)


def published(name: str) -> AcceptanceStats:
    table = np.zeros((3, 10))
    for row, values in zip(table, PUBLISHED["models"][name], strict=True):
        row[: len(values)] = values
    return AcceptanceStats(table)


VICUNA = published("vicuna-7b-v1.3")


def random_stats(random: np.random.Generator, m: int, ranks: int) -> AcceptanceStats:
    """Ranks in any order, some never right; sometimes rows that are (nearly) sure."""
    table = random.random((m, ranks)) ** 2 * (random.random((m, ranks)) < 0.85)
    scale = random.choice([0.3, 0.8, 1.0], (m, 1))
    if random.random() < 0.3:
        # Rows that miss once in a billion join sets of states by a thread.
        table = np.eye(ranks)[random.integers(ranks, size=m)]
        scale = random.choice([0.5, 1 - 1e-9, 1.0], (m, 1))
    return AcceptanceStats(
        table / np.maximum(table.sum(1, keepdims=True), 1e-9) * scale
    )


def random_latency(random: np.random.Generator, rows: int) -> LatencyCurve:
    steps = (
        random.random(rows) * (random.random(rows) < 0.6) * random.choice([0.1, 0.6])
    )
    times = 1 + np.cumsum(steps) - steps[0]
    return LatencyCurve(tuple(range(1, rows + 1)), tuple(times.tolist()))


# Brute force ----------------------------------------------------------------------


def every_subtree(table, depth, state, rows, num_ept):
    """(rows, accepted, [m + 1] chance to end with k prompts) of every subtree."""
    m = len(table)
    for prompts in range(m + 1):
        used = 1 + num_ept * prompts
        if used > rows:
            return
        here = np.eye(m + 1)[prompts]
        partial = [(used, 0.0, here)]
        for chance in table[depth] if depth < state else ():
            partial += [
                (n + size, f + chance * (1 + g), ends + chance * (below - here))
                for n, f, ends in partial
                for size, g, below in every_subtree(
                    table, depth + 1, state, rows - n, num_ept
                )
            ]
        yield from partial


def brute_force(stats, latency, rows, num_ept) -> float:
    """The most tokens per second of any policy, by trying them all.

    A chain of n states stays in s for a share proportional to the sum over spanning
    trees towards s (Markov chain tree theorem). Where all sums are zero there are
    several recurrent classes; each of them is also reached by another policy.
    """
    table = stats.acceptance
    m = len(table)
    options = []
    for state in range(m + 1):
        trees = list(every_subtree(table, 0, state, rows, num_ept))
        columns = np.array([[1 + f, latency(n), *ends] for n, f, ends in trees])
        options.append(np.unique(columns.round(13), axis=0).T)
    best = 0.0
    for first in options[0].T:
        states = [first[:, None, None], options[1][:, :, None]]
        if m == 2:
            states.append(options[2][:, None, :])
        p = [state[2:] for state in states]
        if m == 1:
            weights = [p[1][0], p[0][1]]
        else:
            weights = [
                p[a][c] * p[b][c] + p[a][b] * p[b][c] + p[b][a] * p[a][c]
                for c, a, b in ((0, 1, 2), (1, 0, 2), (2, 0, 1))
            ]
        tokens = sum(w * state[0] for w, state in zip(weights, states, strict=True))
        seconds = sum(w * state[1] for w, state in zip(weights, states, strict=True))
        speed = np.divide(tokens, seconds, out=np.zeros_like(tokens), where=seconds > 0)
        best = max(best, speed.max())
    return best


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("m", "ranks", "rows"), [(1, 3, 7), (2, 2, 7), (2, 3, 6)])
@pytest.mark.parametrize("num_ept", [1, 2])
def test_optimum_equals_brute_force(m, ranks, rows, num_ept, seed) -> None:
    random = np.random.default_rng([seed, m, ranks, num_ept])
    stats = random_stats(random, m, ranks)
    latency = random_latency(random, rows) if seed else CONSTANT
    found = optimal_policy(stats, latency, rows, num_ept)
    assert max(found.rows) <= rows
    oracle = brute_force(stats, latency, rows, num_ept)
    assert found.tokens_per_second == pytest.approx(oracle, rel=1e-9)


def test_optimum_equals_brute_force_at_seven_rows() -> None:
    random = np.random.default_rng(0)
    stats = AcceptanceStats(np.array([[0.5, 0.2, 0.1], [0.35, 0.15, 0.12]]))
    for latency in (CONSTANT, random_latency(random, 7)):
        found = optimal_policy(stats, latency, 7)
        oracle = brute_force(stats, latency, 7, 1)
        assert found.tokens_per_second == pytest.approx(oracle, rel=1e-9)


@pytest.mark.parametrize("num_ept", [1, 2])
def test_best_trees_equal_brute_force(num_ept) -> None:
    """Three levels, and relative values that do not rise with the state."""
    random = np.random.default_rng(num_ept)
    for _ in range(4):
        table = random_stats(random, 3, 2).acceptance
        h = random.normal(size=4)
        best = BestTrees(table, h, 8, num_ept)
        for state in range(4):
            trees = list(every_subtree(table, 0, state, 8, num_ept))
            for rows in range(1, 9):
                oracle = max(f + ends @ h for n, f, ends in trees if n <= rows)
                assert best.values[state, rows] == pytest.approx(oracle, abs=1e-12)
                tree = best.tree(state, rows)
                assert tree.num_rows <= rows
                reached = path_probabilities(tree.parents, tree.ranks, table)
                ends = reached.copy()
                np.subtract.at(ends, list(tree.parents), reached[1:])
                worth = reached[1:].sum() + ends @ h[list(tree.prompts)]
                assert worth == pytest.approx(oracle, abs=1e-12)


# Published figures ----------------------------------------------------------------

# What the search must reach, and what the published trees reach, both with all rows
# counted and rounded to the decimals given.
REQUIRED = {9: 1.72, 14: 1.85, 24: 1.99, 39: 2.12, 64: 2.245, 109: 2.367, 204: 2.486}
PUBLISHED_TREES = {9: 1.627, 14: 1.830, 24: 1.983, 39: 2.108, 64: 2.245, 109: 2.367}
ROUNDING = 0.0005


@pytest.mark.parametrize(("rows", "tau"), REQUIRED.items())
def test_tau_on_the_published_table(rows: int, tau: float) -> None:
    found = optimal_policy(VICUNA, CONSTANT, rows)
    assert found.tau >= tau - ROUNDING
    assert found.tau == pytest.approx(evaluate(found.trees, VICUNA, CONSTANT).tau)


@pytest.mark.parametrize(
    ("name", "rows", "tau"),
    [("vicuna-13b-v1.3", 64, 2.306), ("MobileLLaMA-1.4B-Chat", 289, 2.206)],
)
def test_tau_of_other_published_tables(name: str, rows: int, tau: float) -> None:
    stats = published(name)
    assert optimal_policy(stats, CONSTANT, rows).tau == pytest.approx(tau, abs=ROUNDING)
    trees = baseline_trees("paper", stats, rows)
    assert evaluate(trees, stats, CONSTANT).tau >= tau - 0.001 - ROUNDING


@pytest.mark.parametrize(("rows", "tau"), [*PUBLISHED_TREES.items(), (204, 2.486)])
def test_paper_policy_reaches_the_published_trees(rows: int, tau: float) -> None:
    value = evaluate(baseline_trees("paper", VICUNA, rows), VICUNA, CONSTANT)
    assert tau - ROUNDING <= value.tau <= optimal_policy(VICUNA, CONSTANT, rows).tau


def test_paper_policy_has_the_published_shape() -> None:
    """Their 7B trees for an input budget of 105 have 10, 33, 34 candidates."""
    trees = paper_policy(VICUNA, 109).trees
    assert [tree.num_nodes - 1 for tree in trees] == [0, 10, 33, 34]
    assert [tree.prompts[0] for tree in trees] == [3, 3, 3, 3]
    assert [sum(tree.prompts[1:]) for tree in trees] == [0, 30, 72, 71]


# Evaluation -----------------------------------------------------------------------


def simulate(policy: TreePolicy, stats: AcceptanceStats, steps: int, seed: int):
    """Mean tokens per step and share of each state in `steps` made-up steps."""
    random = np.random.default_rng(seed)
    bounds = np.cumsum(stats.acceptance, axis=1)
    children = [
        {
            edge: node
            for node, edge in enumerate(zip(t.parents, t.ranks, strict=True), 1)
        }
        for t in policy.trees
    ]
    draws = random.random((steps, len(bounds)))
    truths = [
        np.searchsorted(b, d, "right") for b, d in zip(bounds, draws.T, strict=True)
    ]
    visits = np.zeros(len(policy.trees))
    tokens = state = 0
    for truth in np.stack(truths, axis=1).tolist():
        visits[state] += 1
        node = 0
        tokens += 1
        for rank in truth:
            child = children[state].get((node, rank))
            if child is None:
                break
            node = child
            tokens += 1
        state = policy.trees[state].prompts[node]
    return tokens / steps, visits / steps


@pytest.mark.parametrize("num_ept", [1, 2])
def test_evaluate_agrees_with_simulation(num_ept: int) -> None:
    latency = LatencyCurve.linear(1.0, 0.01)
    for policy in (
        optimal_policy(VICUNA, latency, 20, num_ept).policy,
        random_policy(VICUNA, 60, num_ept, seed=3),
    ):
        value = evaluate(policy, VICUNA, latency)
        tau, share = simulate(policy, VICUNA, 60_000, seed=num_ept)
        assert tau == pytest.approx(value.tau, abs=0.02)
        np.testing.assert_allclose(share, value.state_distribution, atol=0.015)
        rows = np.array([tree.num_rows for tree in policy.trees])
        seconds = np.dot(value.state_distribution, latency(rows))
        assert value.tokens_per_second == pytest.approx(value.tau / seconds)


def test_evaluate_by_hand() -> None:
    """One prompt token: state 0 goes to 1, state 1 back to 0 unless accepted."""
    stats = AcceptanceStats(np.array([[0.5, 0.25]]))
    policy = TreePolicy((chain_tree(0, [1]), chain_tree(1, [0, 1])))
    value = evaluate(policy, stats, LatencyCurve((1, 2, 3), (1, 1.5, 2)))
    assert value.state_distribution == pytest.approx((1 / 3, 2 / 3))
    assert value.tau == pytest.approx(1 / 3 + 2 / 3 * 1.5)
    assert value.tokens_per_second == pytest.approx(value.tau / (0.5 + 2 / 3 * 2))


def test_evaluate_chains_that_split_or_cycle() -> None:
    table = np.array([[0.5], [0.5]])
    stats = AcceptanceStats(table)
    # From state 0 the request alternates between 0 and 1; state 2 stays by itself.
    alone = chain_tree(2, [2, 2, 2])
    policy = TreePolicy((chain_tree(0, [1]), chain_tree(1, [0, 0]), alone))
    value = evaluate(policy, stats, CONSTANT)
    assert value.state_distribution == pytest.approx((0.5, 0.5, 0))
    assert value.tau == pytest.approx(1.25)
    # A rare way out of a state is still taken in the long run.
    rare = AcceptanceStats(np.array([[1e-9], [0.5]]))
    policy = TreePolicy((chain_tree(0, [1]), chain_tree(1, [1, 2]), alone))
    assert evaluate(policy, rare, CONSTANT).state_distribution[2] == pytest.approx(1)


@pytest.mark.parametrize("row", [(0.7, 0.2, 0.1), (0.3, 0.6, 0.1), (0.1, 0.3, 0.6)])
def test_rounding_opens_no_way_out(row: tuple[float, ...]) -> None:
    """One of three children is surely right, so the request stays in state 1."""
    tree = SparseTree((0, 0, 0), (0, 1, 2), (0, 1, 1, 1))
    assert 1 - row[0] - row[1] - row[2] != 0
    policy = TreePolicy((chain_tree(0, [1]), tree))
    value = evaluate(policy, AcceptanceStats(np.array([row])), CONSTANT)
    assert value.state_distribution == (0, 1)
    assert value.tau == pytest.approx(2)


def test_evaluate_refuses_foreign_statistics() -> None:
    policy = paper_policy(VICUNA, 40)
    short = AcceptanceStats(VICUNA.acceptance[:2])
    with pytest.raises(ValueError, match=r"3 prompt tokens.* has 2"):
        evaluate(policy, short, CONSTANT)
    narrow = AcceptanceStats(VICUNA.acceptance[:, :2])
    with pytest.raises(ValueError, match="ends at rank 1"):
        evaluate(policy, narrow, CONSTANT)


# Properties -----------------------------------------------------------------------

LATENCIES = {
    "constant": CONSTANT,
    "gentle": LatencyCurve.linear(0.02, 0.0001),
    "steep": LatencyCurve.linear(0.02, 0.002),
    "blocks": LatencyCurve((1, 16, 17, 32, 33, 129), (1, 1, 1.3, 1.3, 1.7, 2.9)),
}


@pytest.mark.parametrize("latency", LATENCIES.values(), ids=LATENCIES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 30, 64, 129])
@pytest.mark.parametrize("num_ept", [1, 2])
def test_never_worse_than_any_alternative(latency, rows: int, num_ept: int) -> None:
    found = optimal_policy(VICUNA, latency, rows, num_ept)
    assert found.tokens_per_second >= 1 / latency(1) - 1e-9
    assert max(found.rows) <= rows
    policy = found.policy
    assert (policy.num_ept, policy.num_prompt_tokens) == (num_ept, 3)
    same = evaluate(policy, VICUNA, latency)
    assert same == (found.tau, found.tokens_per_second, found.state_distribution)
    for kind in KINDS:
        trees = baseline_trees(kind, VICUNA, rows, num_ept)
        assert max(tree.num_rows for tree in trees) <= rows
        value = evaluate(trees, VICUNA, latency)
        assert found.tokens_per_second >= value.tokens_per_second - 1e-9, kind


def test_no_small_change_improves_the_optimum() -> None:
    """Beyond brute force: move one prompt token, or one leaf, in any state."""
    for rows, num_ept in ((24, 1), (20, 2)):
        found = optimal_policy(VICUNA, CONSTANT, rows, num_ept)
        for state, tree in enumerate(found.trees):
            prompts = np.array(tree.prompts)
            for source, target in itertools.permutations(range(len(prompts)), 2):
                moved = prompts.copy()
                moved[source] -= 1
                moved[target] += 1
                if moved.min() < 0 or moved.max() > 3:
                    continue
                trees = list(found.trees)
                trees[state] = tree._replace(prompts=tuple(moved.tolist()))
                value = evaluate(trees, VICUNA, CONSTANT)
                assert value.tau <= found.tau + 1e-9


def test_degenerate_statistics() -> None:
    """DraftInputs that are never or always right, and several recurrent classes."""
    for table in itertools.product([0.0, 1.0], repeat=3):
        stats = AcceptanceStats(np.array(table)[:, None])
        right = 3 if all(table) else table.index(0.0)
        found = optimal_policy(stats, CONSTANT, 16)
        assert found.tau == pytest.approx(1 + right)
        assert optimal_policy(stats, CONSTANT, 1).tau == 1
    for seed in range(30):
        random = np.random.default_rng(seed)
        stats = random_stats(random, 4, 3)
        found = optimal_policy(stats, random_latency(random, 20), 20)
        assert found.tau >= 1
        assert sum(found.state_distribution) == pytest.approx(1)


def test_speculation_stops_where_it_does_not_pay() -> None:
    for num_ept in (1, 2):
        found = optimal_policy(VICUNA, LatencyCurve.linear(1, 1), 64, num_ept)
        assert found.rows[0] == 1
        assert found.policy.trees[0] == SparseTree((), (), (0,), num_ept)
        assert (found.tau, found.tokens_per_second, found.mean_rows) == (1, 1, 1)
    hopeless = AcceptanceStats(np.zeros((3, 4)))
    assert optimal_policy(hopeless, LatencyCurve.linear(1, 0.01), 64).mean_rows == 1


def test_more_rows_and_cheaper_rows_never_hurt() -> None:
    taus = [
        optimal_policy(VICUNA, CONSTANT, rows).tau
        for rows in (*range(1, 10), 13, 21, 40)
    ]
    assert (np.diff(taus) >= -1e-9).all()
    speeds = [
        optimal_policy(VICUNA, LatencyCurve.linear(1, cost), 64).tokens_per_second
        for cost in (0, 0.001, 0.01, 0.1, 1)
    ]
    assert (np.diff(speeds) <= 1e-9).all()


def check_order(tree: PlainTree | SparseTree, table: np.ndarray) -> None:
    """Parents first; the chain of best children; then by falling probability."""
    reached = path_probabilities(tree.parents, tree.ranks, table)
    assert all(parent <= c for c, parent in enumerate(tree.parents))
    chain = 0
    while chain in tree.parents:
        children = [c + 1 for c, p in enumerate(tree.parents) if p == chain]
        assert chain + 1 in children
        assert reached[chain + 1] == max(reached[children])
        chain += 1
    assert (np.diff(reached[chain + 1 :]) <= 0).all()


@pytest.mark.parametrize("rows", [16, 64, 129])
def test_candidates_are_in_serving_order(rows: int) -> None:
    random = np.random.default_rng(rows)
    for stats in (VICUNA, random_stats(random, 4, 5), random_stats(random, 2, 3)):
        table = stats.acceptance
        for tree in optimal_policy(stats, CONSTANT, rows).policy.trees:
            check_order(tree, table)
        for kind in KINDS:
            for plain in baseline_trees(kind, stats, rows):
                check_order(plain, table)


def test_ensembles_cost_their_rows() -> None:
    one = optimal_policy(VICUNA, CONSTANT, 40, 1)
    two = optimal_policy(VICUNA, CONSTANT, 40, 2)
    assert 1 < two.tau < one.tau
    for tree in two.policy.trees:
        assert tree.num_rows == tree.num_nodes + 2 * sum(tree.prompts)
    # No prompt token fits into two rows, so nothing can be guessed.
    assert optimal_policy(VICUNA, CONSTANT, 2, 2).tau == 1


def test_alternatives() -> None:
    chain = chain_policy(VICUNA, 64)
    assert all(tree.depth == tree.num_nodes - 1 for tree in chain.trees)
    full = full_policy(VICUNA, 64)
    assert full.trees[3].prompts == (2,) * 21
    assert full.trees[2].num_nodes == 1 + 4 + 16
    paper = paper_policy(VICUNA, 64)
    drawn = random_policy(VICUNA, 64, seed=1)
    assert drawn == random_policy(VICUNA, 64, seed=1)
    assert drawn != random_policy(VICUNA, 64, seed=2)
    for a, b in zip(paper.trees, drawn.trees, strict=True):
        assert (a.num_nodes, sum(a.prompts)) == (b.num_nodes, sum(b.prompts))
    policies = (chain, full, paper, optimal_policy(VICUNA, CONSTANT, 64).policy)
    taus = [evaluate(policy, VICUNA, CONSTANT).tau for policy in policies]
    assert taus == sorted(taus)
    assert evaluate(drawn, VICUNA, CONSTANT).tau < taus[2]


def test_wide_trees_are_found_but_not_served() -> None:
    found = optimal_policy(VICUNA, CONSTANT, 204)
    assert found.rows == (4, 44, 204, 204)
    with pytest.raises(TreeError, match="204 rows; at most 129"):
        _ = found.policy
    with pytest.raises(TreeError, match="at most 129"):
        paper_policy(VICUNA, 204)


@pytest.mark.parametrize("value", [0, -1, 1025, 10**9, 2.5, "64", True, None])
def test_absurd_caps(value) -> None:
    for call in (
        lambda: optimal_policy(VICUNA, CONSTANT, value),
        lambda: optimal_policy(VICUNA, CONSTANT, 64, value),
        lambda: paper_policy(VICUNA, value),
        lambda: random_policy(VICUNA, 64, value),
    ):
        with pytest.raises(SearchError, match=r"expected an integer from 1 to 1024"):
            call()
    with pytest.raises(SearchError, match="'papers'"):
        baseline_trees("papers", VICUNA, 64)  # type: ignore[arg-type]


# Latency --------------------------------------------------------------------------


def test_latency_curve() -> None:
    curve = LatencyCurve((1, 5, 10), (0.02, 0.03, 0.04))
    assert curve(1) == 0.02
    assert curve(3) == pytest.approx(0.025)
    assert curve(20) == pytest.approx(0.08)  # as if all rows cost their mean
    assert curve(np.array([[5, 10]])).tolist() == [[0.03, 0.04]]
    assert LatencyCurve.constant(2.0)(1000) == 2.0
    assert LatencyCurve.linear(1.0, 0.5)(5) == 3.0
    assert curve == LatencyCurve([1, 5, 10], [0.02, 0.03, 0.04])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "seconds", "tail", "word"),
    [
        ((), (), None, "at least one"),
        ((1, 2), (1.0,), None, "one time for each"),
        ((2, 3), (1.0, 2.0), None, "starts at 2 rows"),
        ((1, 3, 3), (1.0, 2.0, 3.0), None, "3 rows after 3"),
        ((1, 2), (1.0, 0.5), None, "less than"),
        ((1,), (0.0,), None, "positive time"),
        ((1,), (float("nan"),), None, "positive time"),
        ((1, 2), (1.0, float("inf")), None, "positive time"),
        ((1,), (1.0,), -1.0, "at least 0"),
    ],
)
def test_bad_latencies(rows, seconds, tail, word: str) -> None:
    with pytest.raises(MeasurementError, match=word) as caught:
        LatencyCurve(rows, seconds, tail)
    assert "\n" not in str(caught.value)
    with pytest.raises(MeasurementError, match="at least 1 row"):
        CONSTANT(0)


# Speed and purity -----------------------------------------------------------------


def test_search_is_quick() -> None:
    """Far above what it takes (milliseconds), to hold under any load."""
    deep = typical_acceptance(8, 16)
    for stats, rows, seconds in (
        (VICUNA, 64, 0.25),
        (VICUNA, 512, 1.0),
        (deep, 512, 1.0),
    ):
        times = []
        for _ in range(3):
            start = time.process_time()
            optimal_policy(stats, CONSTANT, rows)
            times.append(time.process_time() - start)
        assert min(times) < seconds


def test_neither_vllm_nor_torch_is_imported() -> None:
    code = (
        "import sys, vllm_ppd.search.tree_search, vllm_ppd.search.baseline_policies; "
        "print([name for name in ('vllm', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
