"""What a calibration counts, against lists and walks made one by one."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vllm_ppd.calibrate import counts as evidence_counts  # noqa: E402
from vllm_ppd.calibrate import rates as evidence_rates  # noqa: E402
from vllm_ppd.calibrate.counts import WEIGHTS, AcceptanceCounts  # noqa: E402
from vllm_ppd.calibrate.rates import Texts, TriedPoints  # noqa: E402
from vllm_ppd.calibrate.step_points import StepPoints, accepted_guesses, walk_steps  # noqa: E402
from vllm_ppd.search.latency import LatencyCurve  # noqa: E402
from vllm_ppd.search.policy_iteration import best_policy  # noqa: E402
from vllm_ppd.train.continuation import Continuation  # noqa: E402
from vllm_ppd.trees.bigram import (
    BigramTable,  # noqa: E402
    BigramTensors,  # noqa: E402
)
from vllm_ppd.trees.drafting import rank_children  # noqa: E402
from vllm_ppd.trees.ngram import match_ngram  # noqa: E402
from vllm_ppd.trees.tree import SparseTree  # noqa: E402

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
    taken = {}

    def settled(points, texts, *limits):
        taken.update(points=points, texts=texts)
        return evidence_rates.settled_evidence(points, texts, *limits)

    monkeypatch.setattr(evidence_counts, "settled_evidence", settled)
    counts.add_texts(Continuation(torch.from_numpy(tokens), written, None))
    # A run in two parts, in any order, and logits in pieces.
    for some in (slice(20, None), slice(0, 20)):
        counts.add_points(sequence[some], target[some])
        mine = logits.view(-1, M, VOCABULARY)[some].flatten(0, 1)
        for first in range(0, len(mine), 7):
            counts.add_logits(first, mine[first : first + 7].float())
        counts.end_points()
    acceptance, weights = counts.acceptance({"of": "a test"}), counts.weights()
    assert acceptance.source == {"of": "a test"}
    assert set(weights) <= set(WEIGHTS) and (with_table or weights == (0.0, 0.0))
    assert bool(acceptance.unprompted.any()) == with_table
    points, texts = taken["points"], taken["texts"]
    bigram = BigramTensors.of(table) if table else None
    matched = 0
    for index, (s, p) in enumerate(places):
        root, end = p + 1, (LENGTH, 30)[s]
        match_class, chain = match_ngram(tokens[s, : root + 1])
        future = tokens[s, root + 1 : end]
        same = [a == b for a, b in zip(chain, future, strict=False)]
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
                    beside = place(row, root + d, weight, int(chain[right]))
                assert points.beside[w, index, d] == beside
        assert points.alone[index] == place(None, root, 0.0)
        beside = K
        if False in same:
            beside = place(None, root + right, 0.0, int(chain[right]))
        assert points.beside_alone[index] == beside
        then = texts.after(points.text[[index]], points.root[[index]], np.array([3]))
        next_root = root + 3 if root + 3 < end - M else 0
        assert then == match_ngram(tokens[s, : next_root + 1])[0]
    assert matched > 5


def some_points(rng, runs=((0, 5, 30), (1, 1, 12), (1, 20, 1), (2, 1, 25))):
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
        alone=places(),
        beside_alone=np.where(wrong, places(), K),
    )


# By match class; state by state a little larger.
TREES = tuple(
    tuple(
        SparseTree((0, 0, 1, 3, 2), (0, 1, 0, 0, 1)[:5], (1, state, 2, 0, 1, 0))
        if match_class
        else SparseTree(
            (0, 1)[: state + 1], (1, 0)[: state + 1], (0, 1, 2)[: state + 2]
        )
        for state in range(M + 1)
    )
    for match_class in range(3)
)


def step_of(points: StepPoints, at: int, end: int, state: int, trees):
    """(tokens, next state) of a step at a point, `end` being the run's."""
    match_class = points.match_class[at]
    tree = trees[match_class][state]
    node, depth = 0, 0
    while True:
        on = match_class > 0 and depth <= points.right[at]
        if on and depth < points.right[at]:
            rank = 0
        elif on:
            place = points.beside_alone[at]
            if depth < state:
                place = points.beside[at, depth]
            rank = 1 + place if place < K else None
        elif depth < state:
            rank = points.prompted[at, depth]
        else:
            rank = points.alone[at + depth] if at + depth < end else None
        children = zip(tree.parents, tree.ranks, strict=True)
        found = [c for c, place in enumerate(children, 1) if place == (node, rank)]
        if not found or (rank is not None and rank == K and not on):
            return depth + 1, tree.prompts[node]
        node, depth = found[0], depth + 1


def runs_of(points: StepPoints):
    begin = 0
    for index in range(1, len(points.root) + 1):
        if index == len(points.root) or (
            points.text[index] != points.text[index - 1]
            or points.root[index] != points.root[index - 1] + 1
        ):
            yield begin, index
            begin = index


def walked(points: StepPoints, trees):
    """[N, m + 1] how often steps begin, by walking; (point, state, weight, tokens)."""
    begins, steps = np.zeros((len(points.root), M + 1)), []
    for begin, end in runs_of(points):
        burn_in = 0 if points.fresh[begin] else min(8, (end - begin) // 2)
        starts = max(1, burn_in)
        for first in range(begin, begin + starts):
            at, state = first, 0
            while at < end:
                advance, then = step_of(points, at, end, state, trees)
                if at >= begin + burn_in:
                    begins[at, state] += 1 / starts
                    steps.append((at, state, 1 / starts, advance))
                at, state = at + advance, then
    return begins, steps


@pytest.mark.parametrize("seed", range(3))
def test_steps_begin_where_walks_land(seed):
    points = some_points(np.random.default_rng(seed))
    begins, steps = walked(points, TREES)
    found = walk_steps(points, TREES, K)
    np.testing.assert_allclose(found.begins, begins)
    for at, state, _, advance in steps:
        assert found.advances[at, state] == advance
    assert (begins.sum(axis=0) > 0).all()
    # Without matches the trees of class 0 alone are walked.
    without = points.without_matches()
    np.testing.assert_allclose(
        walk_steps(without, TREES[:1], K).begins, walked(without, TREES[:1])[0]
    )


def test_rates_are_those_of_the_steps(monkeypatch):
    rng = np.random.default_rng(3)
    points = some_points(rng, [(0, 5, 200), (1, 1, 200), (2, 1, 1), (2, 9, 150)])
    values = {field.name: getattr(points, field.name) for field in fields(points)}
    for name in ("prompted", "beside"):
        # A second weight that is always worse.
        values[name] = np.stack([np.full_like(values[name], K), values[name]])
    tried = TriedPoints(**values)
    texts = Texts(M)
    class_at, first = rng.integers(0, 3, (3, 240)), np.zeros(3, dtype=int)
    assert texts.add(class_at, first, np.full(3, 200)) == 0

    def fixed(acceptance, *_):
        return SimpleNamespace(trees=TREES[: acceptance.num_classes])

    monkeypatch.setattr(evidence_rates, "best_policy", fixed)
    monkeypatch.setattr(evidence_rates, "_ELSEWHERE", 0.0)
    curve = LatencyCurve.constant()
    acceptance, best = evidence_rates.settled_evidence(tried, texts, K, curve, 1)
    assert best == (1, 1)
    prompted, alone = np.zeros((M, K + 1)), np.zeros(K + 1)
    overall = np.zeros((M + 1, K + 1))
    hits, tries, beside = np.zeros((2, 8)), np.zeros((2, 8)), np.zeros((2, M, K + 1))
    moves = np.full((2, 3, 3), 1e-3)
    for at, state, weight, advance in walked(points, TREES)[1]:
        match_class, right = points.match_class[at], points.right[at]
        if match_class == 0:
            for d in range(advance):
                if d < state:
                    prompted[d, points.prompted[at, d]] += weight
                elif d < M + 2 and d < points.left[at]:
                    alone[points.alone[at + d]] += weight
        else:
            hits[match_class - 1, :right] += weight
            tries[match_class - 1, : points.tried[at]] += weight
            if points.tried[at] > right and right < state:
                beside[match_class - 1, right, points.beside[at, right]] += weight
        then = points.root[at] + advance
        # No point begins with the last tokens; another text does.
        then = class_at[points.text[at], then if then < 200 - M else 0]
        moves[int(advance > 1), match_class, then] += weight
    for at, state, weight, advance in walked(points.without_matches(), TREES[:1])[1]:
        for d in range(advance):
            if d < state:
                overall[d, points.prompted[at, d]] += weight
            elif d < M + 2 and d < points.left[at]:
                overall[M, points.alone[at + d]] += weight

    def rates(counted: np.ndarray) -> np.ndarray:
        return counted[..., :-1] / np.maximum(counted.sum(-1, keepdims=True), 1e-9)

    np.testing.assert_allclose(acceptance.prompted, rates(prompted))
    np.testing.assert_allclose(acceptance.unprompted, rates(alone))
    np.testing.assert_allclose(acceptance.overall, rates(overall))
    np.testing.assert_allclose(acceptance.chain, hits / np.maximum(tries, 1e-9))
    np.testing.assert_allclose(acceptance.beside, rates(beside))
    np.testing.assert_allclose(acceptance.moves, moves / moves.sum(axis=2)[..., None])
    assert tries.sum() > 5 and beside.sum() > 1


@pytest.mark.parametrize("sources", [(1.0, 1.0, 0.3), (1.0, 0.0, 0.0)])
def test_what_is_promised_is_what_a_walk_gets(sources):
    """Text in passages that are easy to guess, and others that are not: most of its
    tokens are in the former, most of its steps in the latter."""
    rng = np.random.default_rng(5)
    length, texts = 400, Texts(M)
    # Of two prompt tokens and the table alone.
    weak = np.array(sources)[:, None]
    hard = np.zeros((20, length), dtype=bool)
    for row in hard:
        at = 0
        while at < length:
            some = rng.integers(10, 40)
            row[at : at + some] = rng.random() < 0.4
            at += some
    texts.add(np.zeros(hard.shape, dtype=int), np.zeros(20, int), np.full(20, length))
    parts = []
    for text in range(20):
        n = length - 10
        easy = ~hard[text, 1 : n + 1]
        place = np.where(
            rng.random((M + 1, n)) < weak * np.where(easy, 0.85, 0.15),
            0,
            K,
        )
        nothing = np.zeros(n, dtype=int)
        parts.append(
            TriedPoints(
                text=np.full(n, text),
                root=np.arange(1, n + 1),
                fresh=np.arange(n) == 0,
                match_class=nothing,
                right=nothing,
                tried=nothing,
                prompted=place[None, :M].swapaxes(1, 2),
                beside=np.full((1, n, M), K),
                alone=place[M],
                beside_alone=np.full(n, K),
            )
        )
    points = TriedPoints.joined(parts)
    curve = LatencyCurve((1, 8, 32), (1.0, 1.2, 2.0))
    acceptance, best = evidence_rates.settled_evidence(points, texts, K, curve, 1)
    known = points.with_weights(best)

    def promised_over_walked(acceptance) -> float:
        found = best_policy(acceptance, curve, 64, 1)
        steps = walk_steps(known, found.trees, K)
        return found.tau * steps.begins.sum() / (steps.begins * steps.advances).sum()

    assert promised_over_walked(acceptance) == pytest.approx(1, abs=0.02)
    if not sources[1]:
        # Counted over all tokens it is too much.
        everywhere = evidence_rates._from_everywhere(known)
        naive = evidence_rates._counted(known, everywhere, everywhere, texts, K)
        assert promised_over_walked(naive) > 1.05


def test_a_middling_tree():
    ranks = np.array([[3, 1, 0], [3, 2, 0], [4, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(accepted_guesses(ranks), [3, 1, 0, 2])
    np.testing.assert_array_equal(accepted_guesses(ranks[:, :1]), [1, 1, 0, 1])
