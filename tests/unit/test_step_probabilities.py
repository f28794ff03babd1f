"""Trees that a step chooses by its own probabilities: shares of children, places."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from step_points import Point, Ranker  # noqa: E402
from step_probabilities import NODES, places_of_truth  # noqa: E402
from step_starts import step_starts  # noqa: E402

from vllm_ppd.trees.bigram import BigramCounts  # noqa: E402

VOCABULARY, DEPTHS = 40, 3


@pytest.fixture
def ranker() -> Ranker:
    rng = np.random.default_rng(0)
    counts = BigramCounts(VOCABULARY)
    pairs = rng.integers(0, VOCABULARY, (2, 300))
    counts.add(pairs[0], pairs[1], np.ones(300))
    return Ranker(counts.table(5, DEPTHS))


@pytest.fixture
def point() -> Point:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(DEPTHS, VOCABULARY)) * 2
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    best = np.argsort(-logits, axis=1)[:, :32]
    tokens = rng.integers(0, VOCABULARY, DEPTHS + 1)
    return Point(logits, best, tokens[:-1], tokens[1:])


def test_shares_are_a_softmax_over_the_whole_vocabulary(ranker, point):
    parent = 7
    found = ranker.children(point, 1, parent)
    gains = np.full(VOCABULARY, ranker._floor[parent])
    gains[ranker._ids[parent]] = ranker._gains[parent]
    scores = np.exp(point.logits[1] + ranker._weights[1] * gains)
    expected = scores / scores.sum()
    assert found.shares == pytest.approx(expected[found.ids])
    assert (np.diff(found.shares) <= 0).all()
    # Better than all that is left out.
    left = np.setdiff1d(np.arange(VOCABULARY), found.ids)
    assert found.shares[-1] >= expected[left].max()


def test_places_are_those_of_all_nodes_sorted(ranker, point):
    """With two depths all nodes can be listed."""
    logits, best = point.logits[:2], point.best[:2]
    for truth in itertools.product(range(0, VOCABULARY, 3), repeat=2):
        parents = np.array([point.parents[0], truth[0]])
        short = Point(logits, best, parents, np.array(truth))
        places = places_of_truth(short, ranker, lambda depth, shares: shares)
        chances: dict[tuple[int, ...], float] = {}
        first = ranker.children(short, 0, int(parents[0]))
        for token, share in zip(first.ids.tolist(), first.shares, strict=True):
            chances[token,] = share
            below = ranker.children(short, 1, token)
            for child, more in zip(below.ids.tolist(), below.shares, strict=True):
                chances[token, child] = share * more
        order = sorted(chances, key=lambda path: -chances[path])[: NODES[-1]]
        for depth in range(2):
            path = truth[: depth + 1]
            expected = order.index(path) + 1 if path in order else NODES[-1] + 1
            assert places[depth] == expected


def test_a_sure_guess_is_the_first_node(ranker, point):
    def sure(depth: int, shares: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(shares)) == 0, 0.9, 0.01)

    parent = int(point.parents[0])
    for depth in range(DEPTHS):
        parent = int(ranker.children(point, depth, parent).ids[0])
        point.truth[depth] = parent
    point.parents[1:] = point.truth[:-1]
    assert places_of_truth(point, ranker, sure).tolist() == [1, 2, 3]
    # A wrong first token: what is below it is never right.
    point.truth[0] = ranker.children(point, 0, int(point.parents[0])).ids[1]
    places = places_of_truth(point, ranker, sure)
    assert 1 < places[0] <= NODES[-1]


def test_steps_begin_where_a_walk_lands():
    advances = np.array([1, 4, 1, 2, 3, 1, 1, 1, 6, 1, 2, 1, 1, 1, 5, 1, 1, 2, 1, 1])
    landed = np.zeros(len(advances))
    for begin in range(8):
        at = begin
        while at < len(advances):
            landed[at] += (at >= 8) / 8
            at += advances[at]
    np.testing.assert_allclose(step_starts(advances), landed)
    # Whoever starts where, an easy passage is entered once and left at its end.
    np.testing.assert_allclose(step_starts(advances)[14], 1)
    assert not step_starts(advances)[15:19].any()
    np.testing.assert_allclose(step_starts(np.array([3])), [1])
