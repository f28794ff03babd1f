"""Online learning of bigrams: against dictionaries, in torch and compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_ppd.kernels.cpu.bigram import CpuBigramLearner
from vllm_ppd.trees.bigram import (
    OBSERVED,
    ROW_MEMORY,
    SMOOTHING,
    BigramCounts,
    BigramTable,
    OnlineBigram,
    learn_bigrams,
)

VOCABULARY, SIZE = 40, 12


def reference(live, tokens, logits):
    learn_bigrams(live, torch.from_numpy(tokens), logits)


def compiled(live, tokens, logits):
    CpuBigramLearner(live).run(tokens, logits)


@pytest.fixture(params=[reference, compiled])
def learn(request):
    return request.param


def empty(vocabulary: int = VOCABULARY) -> OnlineBigram:
    return OnlineBigram.of(BigramTable.empty(vocabulary, SIZE, (1.0,)))


def observations(seed: int, rows: int, vocabulary: int = VOCABULARY):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, min(vocabulary, 6), rows)
    logits = generator.normal(size=(rows, vocabulary)) * 3
    return tokens, torch.from_numpy(logits).float()


class Book:
    """The same by dictionaries, one observation at a time."""

    def __init__(self, vocabulary: int):
        self.size = min(SIZE, vocabulary)
        self.counts: list[dict[int, float]] = [
            dict.fromkeys(range(self.size), 0.0) for _ in range(vocabulary)
        ]
        self.totals = np.zeros(vocabulary)
        self.base = np.full(vocabulary, 1.0)

    def add(self, tokens, logits):
        chances = logits.double().softmax(1).numpy()
        self.base += chances.sum(0)
        done = set()
        for token, chance in zip(tokens.tolist(), chances, strict=True):
            if token in done:
                continue
            done.add(token)
            self.totals[token] += 1
            row = self.counts[token]
            for new in np.argsort(-chance)[:OBSERVED].tolist():
                row[new] = row.get(new, 0.0) + chance[new]
            best = sorted(row, key=lambda c: -row[c])[: self.size]
            self.counts[token] = {c: row[c] for c in best}
        self.seen = done

    def gain(self, token, follower):
        base = (self.base[follower] + 1) / (self.base.sum() + len(self.base))
        seen = self.totals[token] + SMOOTHING
        return np.log((self.counts[token][follower] / base + SMOOTHING) / seen)


@pytest.mark.parametrize("vocabulary", [5, VOCABULARY, 4099])
def test_against_dictionaries(learn, vocabulary):
    live = empty(vocabulary)
    book = Book(vocabulary)
    for seed in range(30):
        tokens, logits = observations(seed, 6, vocabulary)
        learn(live, tokens, logits)
        book.add(tokens, logits)
        for token in book.seen:
            ids = live.table.ids[token].tolist()
            listed = [c for c in ids if book.counts[token].get(c, 0) > 0]
            want = [c for c in book.counts[token] if book.counts[token][c] > 0]
            assert listed == want
            gains = [book.gain(token, c) for c in listed]
            got = live.table.gains[token, : len(listed)].numpy()
            np.testing.assert_allclose(got, gains, atol=2e-4)
            floor = np.log(SMOOTHING / (book.totals[token] + SMOOTHING))
            assert float(live.table.floor[token]) == pytest.approx(floor, abs=1e-5)
            assert len(set(ids)) == book.size


def test_an_empty_table_changes_no_ranks_and_others_stay_where_they_are(learn):
    live = empty()
    assert not live.table.gains.any() and not live.table.floor.any()
    ids = live.table.ids.clone()
    learn(live, *observations(0, 3))
    untouched = [t for t in range(VOCABULARY) if t not in observations(0, 3)[0]]
    assert torch.equal(live.table.ids[untouched], ids[untouched])
    assert not live.table.gains[untouched].any()


def test_it_goes_on_from_a_calibrated_table(learn):
    """The same sightings again change little; other ones take over."""
    generator = np.random.default_rng(3)
    chances = generator.dirichlet(np.full(VOCABULARY, 0.2), VOCABULARY)
    counts = BigramCounts(VOCABULARY)
    parents = np.repeat(np.arange(VOCABULARY), VOCABULARY)
    ids = np.tile(np.arange(VOCABULARY), VOCABULARY)
    counts.add(parents, ids, 300 * chances.ravel())
    table = counts.table(SIZE, 2)
    live = OnlineBigram.of(table)
    np.testing.assert_allclose(live.totals, 300, rtol=1e-3)
    listed = np.take_along_axis(chances, table.ids.astype(int), 1)
    np.testing.assert_allclose(live.counts, 300 * listed, rtol=2e-2, atol=0.2)
    same = torch.from_numpy(np.log(chances + 1e-9)).float()
    learn(live, np.arange(VOCABULARY), same)
    np.testing.assert_allclose(live.table.gains, table.gains, atol=0.1)
    # The table that was given is a user's file and stays.
    assert (table.ids == counts.table(SIZE, 2).ids).all()
    other = torch.zeros(1, VOCABULARY)
    other[0, 7] = 20.0
    for _ in range(400):
        learn(live, np.array([5]), other)
    assert live.table.ids[5, 0] == 7


def test_old_observations_fade(learn):
    live = empty()
    live.totals[0] = live.counts[0, 3] = ROW_MEMORY
    row = torch.zeros(1, VOCABULARY)
    row[0, 4] = 20.0
    for _ in range(int(0.6 * ROW_MEMORY)):
        learn(live, np.array([0]), row)
    assert float(live.totals[0]) <= ROW_MEMORY
    assert live.table.ids[0, :2].tolist() == [4, 3]


def test_nothing_is_learnt_of_what_is_no_number(learn):
    live = empty()
    rows = torch.zeros(2, VOCABULARY)
    rows[0] = torch.nan
    rows[1] = -torch.inf
    learn(live, np.array([1, 2]), rows)
    assert torch.isfinite(live.table.gains).all() and torch.isfinite(live.base).all()
    assert not live.counts.any()
    assert all(len(set(row)) == SIZE for row in live.table.ids.tolist())
