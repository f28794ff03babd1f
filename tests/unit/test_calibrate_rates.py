"""What a calibration counts, against lists and walks made one by one."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from vllm_ppd.calibrate import counts as counts_module
from vllm_ppd.calibrate import rates as rates_module
from vllm_ppd.calibrate.counts import WEIGHTS, AcceptanceCounts
from vllm_ppd.calibrate.rates import StepPoints, Steps, max_advance, walk_steps
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.train.continuation import Continuation
from vllm_ppd.trees.bigram import BigramTable, BigramTensors
from vllm_ppd.trees.drafting import rank_children
from vllm_ppd.trees.ngram import match_ngram
from vllm_ppd.trees.tree import SparseTree

VOCABULARY, M, K, LENGTH = 12, 2, 5, 40


def some_table(rng) -> BigramTable:
    ids = np.stack([rng.permutation(VOCABULARY)[:4] for _ in range(VOCABULARY)])
    gains = rng.normal(size=ids.shape) * 2
    floor, base = np.full(VOCABULARY, -2.0), np.full(VOCABULARY, 1 / VOCABULARY)
    return BigramTable(ids, gains, floor, (1.0,) * M, base)


@pytest.mark.parametrize("with_table", [True, False])
def test_every_list_is_looked_through(with_table, monkeypatch):
    rng = np.random.default_rng(0)
    table = some_table(rng) if with_table else None
    # Text that repeats itself, so that there are matches of all lengths.
    text = np.tile(rng.integers(0, VOCABULARY, 9), 6)[:LENGTH]
    tokens = np.stack([text, rng.integers(0, VOCABULARY, LENGTH)])
    tokens[0, 25:28] = rng.integers(0, VOCABULARY, 3)
    written = torch.ones(2, LENGTH).bool()
    written[1, 30:] = False
    places = [(s, p) for s in range(2) for p in range(26)]
    sequence = torch.tensor([[s] for s, _ in places])
    target = torch.tensor([[p + d for d in range(1, M + 1)] for _, p in places])
    logits = torch.from_numpy(rng.normal(size=(len(places) * M, VOCABULARY)) * 2)
    counts = AcceptanceCounts(M, K, table)
    settled = Mock(wraps=rates_module.settled_acceptance)
    monkeypatch.setattr(counts_module, "settled_acceptance", settled)
    counts.begin(Continuation(torch.from_numpy(tokens), written, None))
    # A run in any order, and in pieces.
    order = np.roll(np.arange(len(places)), 20)
    rows = logits.view(-1, M, VOCABULARY).float()
    for index in np.split(order, range(7, len(order), 7)):
        counts.add(rows[index], sequence[index, 0].numpy(), target[index].numpy())
    marginal = np.full((M, K), 0.1)
    acceptance, weights = counts.settled(marginal)
    assert (acceptance.marginal == marginal).all()
    assert set(weights) <= set(WEIGHTS) and (with_table or weights == (0.0, 0.0))
    assert bool(acceptance.unprompted.any()) == with_table
    points = settled.call_args.args[0]
    bigram = BigramTensors.of(table) if table else None
    matched = 0
    for index, (s, p) in enumerate(places):
        root, end = p + 1, (LENGTH, 30)[s]
        match_class, draft = match_ngram(tokens[s, : root + 1])
        future = tokens[s, root + 1 : end]
        same = [a == b for a, b in zip(draft, future, strict=False)]
        right = same.index(False) if False in same else len(same)
        matched += match_class > 0 and right > 0
        assert points.text[index] == s and points.root[index] == root
        assert points.fresh[index] == (p == 0)
        assert points.match_class[index] == match_class
        assert points.right[index] == right
        assert points.tried[index] == right + (False in same)

        def place(list_logits, parent, weight, left_out=-1, text=tokens[s]):
            best = rank_children(
                list_logits,
                torch.tensor([text[parent]]),
                bigram,
                weight,
                K,
                torch.tensor([left_out]),
            ).tolist()[0]
            truth = text[parent + 1]
            return best.index(truth) if truth in best else K

        for d in range(M):
            row = logits[index * M + d][None].float()
            for w, weight in enumerate(WEIGHTS if with_table else (0.0,)):
                assert points.prompted[w, index, d] == place(row, root + d, weight)
                beside = K
                if d == right and False in same:
                    beside = place(row, root + d, weight, int(draft[right]))
                assert points.beside[w, index, d] == beside
        assert points.unprompted[index] == place(None, root, 0.0)
        beside = K
        if False in same:
            beside = place(None, root + right, 0.0, int(draft[right]))
        assert points.beside_unprompted[index] == beside
        for advance, then in enumerate(points.next_class[index], 1):
            next_root = root + advance if root + advance < end - M else 0
            assert then == match_ngram(tokens[s, : next_root + 1])[0]
    assert matched > 5


def some_points(rng, runs):
    """Random places, most of them good, in runs of (text, first root, length)."""
    text = np.concatenate([np.full(n, t) for t, _, n in runs])
    root = np.concatenate([np.arange(n) + first for _, first, n in runs])
    n = len(text)
    match_class = rng.integers(0, 3, n)
    right = np.where(match_class, rng.integers(0, 4, n), 0)
    wrong = (match_class > 0) & (rng.random(n) < 0.7)

    def places(*shape):
        return np.minimum(rng.geometric(0.5, (*shape, n)) - 1, K)

    at_right = np.arange(M) == right[:, None]
    return StepPoints(
        text=text,
        root=root,
        fresh=root == 1,
        match_class=match_class,
        right=right,
        tried=right + wrong,
        prompted=places(M).T,
        beside=np.where(at_right & wrong[:, None], places(M).T, K),
        unprompted=places(),
        beside_unprompted=np.where(wrong, places(), K),
        next_class=rng.integers(0, 3, (n, max_advance(M))),
    )


# By match class; with rising num_prompted a little larger.
TREES = tuple(
    tuple(
        SparseTree((0, 0, 1, 3, 2), (0, 1, 0, 0, 1)[:5], (1, num_prompted, 2, 0, 1, 0))
        if match_class
        else SparseTree(
            (0, 1)[: num_prompted + 1],
            (1, 0)[: num_prompted + 1],
            (0, 1, 2)[: num_prompted + 2],
        )
        for num_prompted in range(M + 1)
    )
    for match_class in range(3)
)

# One draft token each.
SMALL = ((SparseTree((0,), (0,), (1, 2)),) * (M + 1),) * 3


def step_of(points: StepPoints, at: int, end: int, num_prompted: int, trees):
    """(tokens, next num_prompted) of a step at a point, `end` being the run's."""
    match_class = points.match_class[at]
    tree = trees[match_class][num_prompted]
    node, depth = 0, 0
    while True:
        on = match_class > 0 and depth <= points.right[at]
        if on and depth < points.right[at]:
            rank = 0
        elif on:
            place = points.beside_unprompted[at]
            if depth < num_prompted:
                place = points.beside[at, depth]
            rank = 1 + place if place < K else None
        elif depth < num_prompted:
            rank = points.prompted[at, depth]
        else:
            rank = points.unprompted[at + depth] if at + depth < end else None
        children = zip(tree.parents, tree.ranks, strict=True)
        match = [c for c, place in enumerate(children, 1) if place == (node, rank)]
        if not match or (rank is not None and rank == K and not on):
            return depth + 1, tree.prompts[node]
        node, depth = match[0], depth + 1


def runs_of(points: StepPoints):
    ended = (np.diff(points.text) != 0) | (np.diff(points.root) != 1)
    return pairwise([0, *np.flatnonzero(ended) + 1, len(points.root)])


def walked(points: StepPoints, trees):
    """Steps as (point, num_prompted, weight, tokens), by walking."""
    steps = []
    for begin, end in runs_of(points):
        burn_in = 0 if points.fresh[begin] else min(8, (end - begin) // 2)
        starts = max(1, burn_in)
        for first in range(begin, begin + starts):
            at, num_prompted = first, 0
            while at < end:
                advance, then = step_of(points, at, end, num_prompted, trees)
                if at >= begin + burn_in:
                    steps.append((at, num_prompted, 1 / starts, advance))
                at, num_prompted = at + advance, then
    return steps


def test_rates_are_those_of_the_steps(monkeypatch):
    rng = np.random.default_rng(3)
    runs = [(0, 5, 200), (1, 1, 200), (1, 300, 12), (2, 1, 1), (2, 9, 150), (2, 200, 1)]
    points = some_points(rng, runs)
    # A second weight that is always worse.
    prompted, beside = (
        np.stack([np.full_like(each, K), each])
        for each in (points.prompted, points.beside)
    )
    tried = replace(points, prompted=prompted, beside=beside)
    policies = {1.0: TREES, 2.0: SMALL}

    def fixed(acceptance, curve, *_):
        return SimpleNamespace(trees=policies[curve.tail][: acceptance.num_classes])

    monkeypatch.setattr(rates_module, "best_policy", fixed)
    monkeypatch.setattr(rates_module, "ROW_PRICES", tuple(policies))
    monkeypatch.setattr(rates_module, "_ELSEWHERE", 0.0)
    acceptance, best = rates_module.settled_acceptance(tried, K, 1)
    assert best == (1, 1)

    def steps_of(points):
        return [s for trees in policies.values() for s in walked(points, trees)]

    def count(places, at, num_prompted, weight, advance):
        """[m + 1, K + 1]: of each prompt token, and of the table alone."""
        for d in range(advance):
            if d < num_prompted:
                places[d, points.prompted[at, d]] += weight
            elif d < M + 2 and d < points.left[at]:
                places[M, points.unprompted[at + d]] += weight

    unmatched, overall = np.zeros((2, M + 1, K + 1))
    hits, tries, beside = np.zeros((2, 8)), np.zeros((2, 8)), np.zeros((2, M, K + 1))
    transitions = np.full((2, 3, 3), 1e-3)
    for at, num_prompted, weight, advance in steps_of(points):
        match_class, right = points.match_class[at], points.right[at]
        if match_class == 0:
            count(unmatched, at, num_prompted, weight, advance)
        else:
            hits[match_class - 1, :right] += weight
            tries[match_class - 1, : points.tried[at]] += weight
            if points.tried[at] > right and right < num_prompted:
                beside[match_class - 1, right, points.beside[at, right]] += weight
        then = points.next_class[at, advance - 1]
        transitions[int(advance > 1), match_class, then] += weight
    for step in steps_of(points.without_ngrams()):
        count(overall, *step)

    def rates(counted: np.ndarray) -> np.ndarray:
        return counted[..., :-1] / np.maximum(counted.sum(-1, keepdims=True), 1e-9)

    np.testing.assert_allclose(acceptance.prompted, rates(unmatched[:M]))
    np.testing.assert_allclose(acceptance.unprompted, rates(unmatched[M]))
    np.testing.assert_allclose(acceptance.overall, rates(overall))
    np.testing.assert_allclose(acceptance.ngram, hits / np.maximum(tries, 1e-9))
    np.testing.assert_allclose(acceptance.beside, rates(beside))
    np.testing.assert_allclose(
        acceptance.transitions, transitions / transitions.sum(axis=2)[..., None]
    )
    assert tries.sum() > 5 and beside.sum() > 1


@pytest.mark.parametrize("sources", [(1.0, 1.0, 0.3), (1.0, 0.0, 0.0)])
def test_what_is_promised_is_what_a_walk_gets(sources, monkeypatch):
    """Text in passages that are easy to predict, and others that are not: most of its
    tokens are in the former, most of its steps in the latter."""
    rng = np.random.default_rng(5)
    length = 400
    # Of two prompt tokens, and of the bigram table alone.
    weak = np.array(sources)[:, None]
    passages = rng.integers(10, 40, (20, 40))
    hard = [np.repeat(rng.random(40) < 0.4, each)[:length] for each in passages]
    points = some_points(rng, [(text, 1, length - 10) for text in range(20)])
    chance = np.where(np.array(hard)[points.text, points.root], 0.15, 0.85)
    place = np.where(rng.random((M + 1, chance.size)) < weak * chance, 0, K)
    points = replace(
        points.without_ngrams(),
        next_class=np.zeros_like(points.next_class),
        prompted=place[None, :M].swapaxes(1, 2),
        beside=np.full((1, chance.size, M), K),
        unprompted=place[M],
    )
    price = 0.03
    monkeypatch.setattr(rates_module, "ROW_PRICES", (price,))
    acceptance, best = rates_module.settled_acceptance(points, K, 1)
    known = points.with_weights(best)

    def promised_over_walked(acceptance) -> float:
        found = best_policy(acceptance, LatencyCurve.linear(1.0, price), 64, 1)
        begins, advances = walk_steps(known, found.trees, K)
        return found.acceptance_length * begins.sum() / (begins * advances).sum()

    assert promised_over_walked(acceptance) == pytest.approx(1, abs=0.02)
    if not sources[1]:
        # Counted over all tokens it is too much.
        everywhere = Steps.everywhere(known)
        naive = rates_module._counted(known, everywhere, everywhere, K)
        assert promised_over_walked(naive) > 1.05


def test_a_medium_tree():
    points = some_points(np.random.default_rng(0), [(0, 1, 4)])
    ranks = np.array([[3, 1, 0], [3, 2, 0], [4, 0, 0], [0, 0, 1]])
    points = replace(points, prompted=ranks).without_ngrams()
    np.testing.assert_array_equal(rates_module._medium_advances(points), [4, 2, 1, 3])
    points = replace(points, prompted=ranks[:, :1], right=np.array([0, 7, 0, 0]))
    np.testing.assert_array_equal(rates_module._medium_advances(points), [2, 8, 1, 2])
