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
    continuation = Continuation(torch.from_numpy(tokens), written, None)
    counts.add_points(continuation, sequence, target)
    for first in range(0, len(logits), 7):
        counts.add_logits(first, logits[first : first + 7].float())
    evidence, weights = counts.evidence({}), counts.weights()

    hits = np.zeros((M, K))
    alone = np.zeros(K)
    chain_hits, chain_tries = np.zeros((2, 8)), np.zeros((2, 8))
    successors = Successors.of(table) if table else None
    for index, (s, p) in enumerate(points):
        root = p + 1
        future = tokens[s, root + 1 : (LENGTH, 30)[s]]
        for d in range(M):
            best = rank_children(
                logits[index * M + d][None].float(),
                torch.tensor([tokens[s, root + d]]),
                successors,
                weights[d],
                K,
            ).tolist()[0]
            if tokens[s, root + d + 1] in best:
                hits[d, best.index(tokens[s, root + d + 1])] += 1
        if table:
            best = table.ids[tokens[s, root]].tolist()
            if tokens[s, root + 1] in best:
                alone[best.index(tokens[s, root + 1])] += 1
        match_class, chain = match_chain(tokens[s, : root + 1])
        for depth, (guess, truth) in enumerate(zip(chain, future, strict=False)):
            if not match_class:
                break
            chain_tries[match_class - 1, depth] += 1
            if guess != truth:
                break
            chain_hits[match_class - 1, depth] += 1
    np.testing.assert_allclose(evidence.overall[:M], hits / len(points))
    np.testing.assert_allclose(evidence.overall[M], alone / len(points))
    assert chain_tries.sum() > 20
    np.testing.assert_allclose(evidence.chain, chain_hits / np.maximum(chain_tries, 1))
    if with_table:
        assert set(weights) <= set(WEIGHTS)
    else:
        assert weights == (0.0, 0.0)
