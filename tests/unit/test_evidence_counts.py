"""What a calibration counts, against lists made one by one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vllm_ppd.candidates import Successors, rank_children  # noqa: E402
from vllm_ppd.successors import SuccessorTable  # noqa: E402
from vllm_ppd.suffix import match_chain  # noqa: E402
from vllm_ppd.train.continuation import Continuation  # noqa: E402
from vllm_ppd.train.evidence_counts import WEIGHTS, EvidenceCounts  # noqa: E402
from vllm_ppd.train.step_starts import accepted_guesses, step_starts  # noqa: E402

VOCABULARY, M, K, LENGTH = 12, 2, 5, 40


def some_table(rng) -> SuccessorTable:
    ids = np.stack([rng.permutation(VOCABULARY)[:4] for _ in range(VOCABULARY)])
    gains = rng.normal(size=ids.shape) * 2
    floor, base = np.full(VOCABULARY, -2.0), np.full(VOCABULARY, 1 / VOCABULARY)
    return SuccessorTable(ids, gains, floor, (1.0,) * M, base)


@pytest.mark.parametrize("with_table", [True, False])
def test_every_list_is_counted_where_it_belongs(with_table):
    rng = np.random.default_rng(0)
    table = some_table(rng) if with_table else None
    # Text that repeats itself, so that there are matches of all lengths.
    text = np.tile(rng.integers(0, VOCABULARY, 9), 6)[:LENGTH]
    tokens = np.stack([text, rng.integers(0, VOCABULARY, LENGTH)])
    tokens[0, 25:28] = rng.integers(0, VOCABULARY, 3)
    written = torch.ones(2, LENGTH).bool()
    written[1, 30:] = False
    points = [(s, p) for s in range(2) for p in range(3, 26)]
    sequence = torch.tensor([[s] for s, _ in points])
    target = torch.tensor([[p + d for d in range(1, M + 1)] for _, p in points])
    logits = torch.from_numpy(rng.normal(size=(len(points) * M, VOCABULARY)) * 2)
    counts = EvidenceCounts(M, K, table)
    counts.add_texts(Continuation(torch.from_numpy(tokens), written, None))
    counts.add_points(sequence, target)
    for first in range(0, len(logits), 7):
        counts.add_logits(first, logits[first : first + 7].float())
    counts.end_points()
    evidence, weights = counts.evidence({}), counts.weights()

    successors = Successors.of(table) if table else None

    def rank_of(index: int, d: int, weight: float) -> int:
        """Of the truth in the list that serving would make; K where it is not there."""
        s, p = points[index]
        best = rank_children(
            logits[index * M + d][None].float(),
            torch.tensor([tokens[s, p + 1 + d]]),
            successors,
            weight,
            K,
        ).tolist()[0]
        truth = tokens[s, p + d + 2]
        return best.index(truth) if truth in best else K

    classes, right, chains = {}, {}, {}
    for s, end in ((0, LENGTH), (1, 30)):
        for root in range(end - 1):
            match_class, chain = match_chain(tokens[s, : root + 1])
            future = tokens[s, root + 1 : end]
            same = [a == b for a, b in zip(chain, future, strict=False)]
            classes[s, root], chains[s, root] = match_class, same
            right[s, root] = same.index(False) if False in same else len(same)
    middle = WEIGHTS[len(WEIGHTS) // 2] if with_table else 0.0
    guessed = []
    for index in range(len(points)):
        first, second = rank_of(index, 0, middle) < 4, rank_of(index, 1, middle) < 2
        guessed.append(first + (first and second))
    starts = walked(points, [right[s, p + 1] for s, p in points], guessed)
    everywhere = walked(points, [0] * len(points), guessed)
    hits, easy, alone = np.zeros((M, K + 1)), np.zeros((M, K + 1)), np.zeros(K + 1)
    chain_hits, chain_tries = np.zeros((2, 8)), np.zeros((2, 8))
    moves = np.full((2, 3, 3), 1e-3)
    for index, (s, p) in enumerate(points):
        root, start, match_class = p + 1, starts[index], classes[s, p + 1]
        for d in range(M):
            rank = rank_of(index, d, weights[d])
            hits[d, rank] += everywhere[index]
            easy[d, rank] += start * (match_class == 0)
        if table:
            best = table.ids[tokens[s, root]].tolist()
            truth = tokens[s, root + 1]
            rank = best.index(truth) if truth in best else K
            alone[rank] += everywhere[index]
        for depth, correct in enumerate(chains[s, root]):
            chain_tries[match_class - 1, depth] += start
            if not correct:
                break
            chain_hits[match_class - 1, depth] += start
        end = (LENGTH, 30)[s]
        advance = 1 + (right[s, root] or guessed[index])
        then = classes[s, min(root + advance, end - 2)]
        after = moves[int(advance > 1), match_class]
        after[then] += start * (1 - advance / end)
        after[classes[s, 0]] += start * advance / end

    def rates(counted: np.ndarray) -> np.ndarray:
        return counted[..., :-1] / np.maximum(counted.sum(-1, keepdims=True), 1e-9)

    np.testing.assert_allclose(evidence.overall[:M], rates(hits))
    np.testing.assert_allclose(evidence.overall[M], rates(alone))
    np.testing.assert_allclose(evidence.prompted, rates(easy))
    assert chain_tries.sum() > 5
    expected = chain_hits / np.maximum(chain_tries, 1e-9)
    np.testing.assert_allclose(evidence.chain, expected)
    np.testing.assert_allclose(evidence.moves, moves / moves.sum(axis=2)[..., None])
    if with_table:
        assert set(weights) <= set(WEIGHTS)
    else:
        assert weights == (0.0, 0.0)


def walked(points, right, guessed) -> list[float]:
    """How often steps begin at each point of each text, by walking there."""
    found = [0.0] * len(points)
    for s in range(2):
        own = [i for i, (text, _) in enumerate(points) if text == s]
        for begin in range(8):
            at = begin
            while at < len(own):
                found[own[at]] += (at >= 8) / 8
                at += 1 + (right[own[at]] or guessed[own[at]])
    return found


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


def test_a_middling_tree():
    ranks = np.array([[3, 1, 0], [3, 2, 0], [4, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(accepted_guesses(ranks), [3, 1, 0, 2])
    np.testing.assert_array_equal(accepted_guesses(ranks[:, :1]), [1, 1, 0, 1])
