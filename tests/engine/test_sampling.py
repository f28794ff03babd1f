"""Sampling with PPD is sampling with vLLM: same draws, same distribution."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from tests.engine.conftest import mixed

SEEDED = {"temperature": 1.0, "seed": 1234, "max_tokens": 64}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8},
        {"temperature": 0.3, "top_p": 0.9, "top_k": 50},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"bad_words": ["self", "return", "name"]},
        {"temperature": 0.0, "bad_words": ["self", "import os", "def"]},
        {"allowed_token_ids": list(range(300, 900))},
        {"min_tokens": 40, "stop": None},
    ],
    ids=lambda extra: "-".join(extra) or "plain",
)
def test_seeded_requests_draw_the_same_tokens(check, texts, extra):
    params = [{**SEEDED, **extra, "seed": 100 + i} for i in range(6)]
    check(mixed(texts, 6, first=12), params)


def test_a_batch_of_different_sampling_parameters(check, texts):
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.0, "frequency_penalty": 1.0},
        {"temperature": 0.8, "seed": 2, "top_p": 0.7, "repetition_penalty": 1.1},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.9, "seed": 5, "bad_words": ["the"], "logprobs": 0},
    ]
    params = [{**kinds[i % 6], "max_tokens": 50 + i} for i in range(12)]
    check(mixed(texts, 12, first=33), params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_of_emitted_and_prompt_tokens(check, texts, temperature):
    params = {**SEEDED, "temperature": temperature, "logprobs": 4, "prompt_logprobs": 2}
    expected, actual, _ = check(mixed(texts, 5, first=3), params)
    close(expected, actual)


def close(expected, actual):
    """The same scores and ranks, of emitted and of prompt tokens."""
    for one, other in zip(expected, actual, strict=True):
        _close(one["logprobs"][0], other["logprobs"][0])
        _close(one["prompt_logprobs"], other["prompt_logprobs"])


def _close(expected, actual):
    assert (expected is None) == (actual is None)
    for a, b in zip(expected or (), actual or (), strict=True):
        if a is None:
            assert b is None
            continue
        assert a.keys() == b.keys()
        for token, (value, rank) in a.items():
            assert b[token][0] == pytest.approx(value, abs=2e-4)
            assert b[token][1] == rank


def test_unseeded_sampling_has_plain_vllms_distribution(
    plain, ppd, plain_engine, ppd_engine, texts
):
    """Two-sample chi-square on 60,000 tokens, most of them verified guesses."""
    prompt = [texts[0][:200]]
    wide = {"max_num_seqs": 256}
    params = {"temperature": 1.0, "n": 5000, "max_tokens": 6, "ignore_eos": True}
    samples = [
        np.array(process.generate({**engine, **wide}, prompt, params)[0]["ids"])
        for process, engine in ((plain, plain_engine), (ppd, ppd_engine))
    ]
    for position in range(6):
        assert _p_value(*(s[:, position] for s in samples)) > 1e-4
    # Pairs: the second token's distribution given the first.
    pairs = [s[:, 1:].astype(np.int64) * 4096 + s[:, :-1] for s in samples]
    for position in range(5):
        assert _p_value(*(p[:, position] for p in pairs)) > 1e-4


def _p_value(a: np.ndarray, b: np.ndarray) -> float:
    counts = [Counter(values.tolist()) for values in (a, b)]
    total = counts[0] + counts[1]
    common = [value for value, count in total.items() if count >= 20]
    table = [
        [*(c[v] for v in common), len(values) - sum(c[v] for v in common)]
        for c, values in zip(counts, (a, b), strict=True)
    ]
    kept = [column for column in zip(*table, strict=True) if sum(column)]
    return chi2_contingency(np.array(kept).T).pvalue if len(kept) > 1 else 1.0
