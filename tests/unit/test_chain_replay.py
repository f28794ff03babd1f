"""Chains are put to the test in text that was written without guesses."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_ppd.search.acceptance_table import AcceptanceStats

from vllm_ppd.adaptive.chain_replay import replay_chains
from vllm_ppd.adaptive.learning import EvidenceLearner
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS, match_ngram


def text(length: int, seed: int = 0) -> np.ndarray:
    """Tokens that often repeat what came a little earlier, for a while."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 30, 40).tolist()
    while len(tokens) < length:
        if rng.random() < 0.2:
            first = rng.integers(0, len(tokens) - 12)
            tokens += tokens[first : first + rng.integers(3, 12)]
        tokens.append(int(rng.integers(0, 30)))
    return np.array(tokens[:length], dtype=np.int32)


def steps_of(tokens: np.ndarray, start: int, count: int) -> list[tuple[int, ...]]:
    """One step after the other, in the plainest way."""
    found, at = [], start
    match_class, chain = match_ngram(tokens[:at])
    while len(found) < count and at + MAX_NGRAM_DRAFTS < len(tokens):
        right = 0
        while right < len(chain) and chain[right] == tokens[at + right]:
            right += 1
        at += right + 1
        before, length = match_class, len(chain)
        match_class, chain = match_ngram(tokens[:at])
        found.append((before, right, length, match_class))
    return found


@pytest.mark.parametrize("settling", [0, 3])
def test_steps_are_those_of_speculation(settling):
    lengths, starts = np.array([600, 220, 60]), np.array([50, 60, 55])
    tokens = np.full((3, 600), -7, dtype=np.int32)
    expected = []
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        tokens[row, :length] = text(length, row)
        steps = steps_of(tokens[row, :length], start, settling + 60)
        expected += steps[settling:]
    replayed = replay_chains(tokens, starts, lengths, 4096, settling, 60)
    assert sorted(zip(*map(np.ndarray.tolist, replayed), strict=True)) == sorted(
        expected
    )
    # The text is no trivial one.
    assert {step[0] for step in expected} == {0, 1, 2}
    assert len({step[1] for step in expected}) > 3


def test_a_text_too_short_says_nothing():
    tokens = text(60)[None]
    for start in (52, 60):
        replayed = replay_chains(tokens, np.array([start]), np.array([60]), 4096, 0, 9)
        assert [len(each) for each in replayed] == [0] * 4


def test_what_is_learnt_of_replayed_steps():
    known = AcceptanceModel.of(AcceptanceStats(np.full((3, 4), 0.1)))
    learner = EvidenceLearner(known.with_typical_chains())
    tokens = text(6000)[None]
    ends = np.array([tokens.size])
    steps = replay_chains(tokens, np.array([100]), ends, 4096, 0, 6000)
    learner.observe_replay(steps)
    assert learner.observations == len(steps.classes) + steps.accepted.sum()
    found = learner.acceptance()
    for match_class in (1, 2):
        lengths = steps.accepted[steps.classes == match_class]
        first, second = (lengths > 0).mean(), (lengths > 1).sum() / (lengths > 0).sum()
        chances = found.chain[match_class - 1]
        assert chances[:2] == pytest.approx([first, second], abs=0.1)
        after = steps.after[(steps.classes == match_class) & (steps.accepted > 0)]
        moves = np.bincount(after, minlength=3) / len(after)
        np.testing.assert_allclose(found.moves[1, match_class], moves, atol=0.1)
