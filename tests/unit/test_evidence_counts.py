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
from vllm_ppd.train.step_starts import advance_chances, step_starts  # noqa: E402

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
    evidence, weights = counts.evidence({}), counts.weights()

    hits, easy = np.zeros((M, K)), np.zeros((M, K))
    alone = np.zeros(K)
    chain_hits, chain_tries = np.zeros((2, 8)), np.zeros((2, 8))
    moves = np.zeros((3, 3))
    successors = Successors.of(table) if table else None
    begins, classes = {}, {}
    for s, end in ((0, LENGTH), (1, 30)):
        right = []
        for root in range(end - 1):
            future = tokens[s, root + 1 : end]
            match_class, chain = match_chain(tokens[s, : root + 1])
            classes[s, root] = match_class
            pairs = zip(chain, future, strict=False)
            right.append(next((i for i, (a, b) in enumerate(pairs) if a != b), None))
            if right[-1] is None:
                right[-1] = min(len(chain), len(future))
        chances = advance_chances(np.array(right))
        for root, share in enumerate(step_starts(chances)):
            begins[s, root] = share
        for root in range(end - 1):
            share, match_class = begins[s, root], classes[s, root]
            for count in range(1, chances.shape[1]):
                # Another text begins where this one ends.
                after = classes[s, root + count if root + count < end - 1 else 0]
                moves[match_class, after] += share * chances[root, count]
            future = tokens[s, root + 1 : end]
            _, chain = match_chain(tokens[s, : root + 1])
            for depth, (guess, truth) in enumerate(zip(chain, future, strict=False)):
                chain_tries[match_class - 1, depth] += share
                if guess != truth:
                    break
                chain_hits[match_class - 1, depth] += share
    unmatched = 0.0
    for index, (s, p) in enumerate(points):
        root = p + 1
        share = begins[s, root] if not classes[s, root] else 0.0
        unmatched += share
        for d in range(M):
            best = rank_children(
                logits[index * M + d][None].float(),
                torch.tensor([tokens[s, root + d]]),
                successors,
                weights[d],
                K,
            ).tolist()[0]
            if tokens[s, root + d + 1] in best:
                rank = best.index(tokens[s, root + d + 1])
                hits[d, rank] += 1
                easy[d, rank] += share
        if table:
            best = table.ids[tokens[s, root]].tolist()
            if tokens[s, root + 1] in best:
                alone[best.index(tokens[s, root + 1])] += 1
    np.testing.assert_allclose(evidence.overall[:M], hits / len(points))
    np.testing.assert_allclose(evidence.overall[M], alone / len(points))
    np.testing.assert_allclose(evidence.prompted, easy / unmatched)
    assert chain_tries.sum() > 20
    np.testing.assert_allclose(evidence.chain, chain_hits / np.maximum(chain_tries, 1))
    moves += 1e-3
    np.testing.assert_allclose(evidence.moves, moves / moves.sum(axis=1)[:, None])
    if with_table:
        assert set(weights) <= set(WEIGHTS)
    else:
        assert weights == (0.0, 0.0)


def test_steps_begin_where_a_walk_lands():
    """Against many walks of the same text."""
    right = np.array([0, 3, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0])
    chances = advance_chances(right)
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    assert chances[1, 4] == 1 and chances[4, 3] == 1
    rng = np.random.default_rng(0)
    landed, walks = np.zeros(len(right)), 4000
    for _ in range(walks):
        at = 0
        while at < len(right):
            landed[at] += 1
            at += rng.choice(chances.shape[1], p=chances[at])
    np.testing.assert_allclose(step_starts(chances), landed / walks, atol=0.03)
