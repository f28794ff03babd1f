"""Sampling on V2 is vLLM's sampling: same draws, same scores, with and without PPD.

V2 draws a token's noise from the request's seed and the token's position, so equal
seeds must give equal tokens whatever was drafted.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_sampling import _close
from tests.engine.v2.test_exactness_v2 import prompts, same

SAMPLED = {"ignore_eos": True, "detokenize": False, "max_tokens": 12}


def compare(plain, ppd, engine, ppd_engine, params: list[dict[str, Any]]) -> int:
    """Decode the same requests in both; return the accepted draft tokens."""
    requests = prompts(len(params), seed=31)
    before = ppd.accepted(ppd_engine)
    expected = plain.generate(engine, requests, params)
    actual = ppd.generate(ppd_engine, requests, params)
    same(expected, actual)
    for a, b in zip(expected, actual, strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            ours = b[name][0] if name == "logprobs" else b[name]
            theirs = a[name][0] if name == "logprobs" else a[name]
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                _close(theirs, ours)
    return ppd.accepted(ppd_engine) - before


def test_a_batch_of_different_ways_to_sample(plain, ppd, tiny_engine, tiny_ppd):
    params = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_k": 12},
        {"temperature": 1.2, "seed": 3, "top_p": 0.8, "logprobs": 2},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "seed": 5, "min_tokens": 8, "stop_token_ids": [3, 4]},
        {"temperature": 1.0, "seed": 6, "allowed_token_ids": list(range(5, 15))},
    ]
    gained = compare(
        plain, ppd, tiny_engine, tiny_ppd, [{**SAMPLED, **p} for p in params]
    )
    assert gained > 2


def test_scores_of_emitted_prompt_and_chosen_tokens(plain, ppd, tiny_engine, tiny_ppd):
    params = [
        {"temperature": 1.0, "seed": 1, "logprobs": 4, "prompt_logprobs": 2},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "logprob_token_ids": [4, 9], "logprobs": 2},
        {"temperature": 0.0},
    ]
    gained = compare(
        plain, ppd, tiny_engine, tiny_ppd, [{**SAMPLED, **p} for p in params]
    )
    assert gained > 2


def test_what_depends_on_the_history(plain, ppd, tiny_engine, tiny_ppd):
    """These requests have chains, beside others that have trees."""
    params = [
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 8, "presence_penalty": 0.8},
        {"temperature": 0.0, "frequency_penalty": 0.6, "logprobs": 1},
        {"temperature": 1.0, "seed": 9},
        {"temperature": 0.0},
    ]
    gained = compare(
        plain, ppd, tiny_engine, tiny_ppd, [{**SAMPLED, **p} for p in params]
    )
    assert gained > 2


def test_requests_that_opt_out(plain, ppd, tiny_engine, tiny_ppd):
    params = {**SAMPLED, "temperature": 0.0, "extra_args": {"ppd": False}}
    assert compare(plain, ppd, tiny_engine, tiny_ppd, [params, params]) == 0


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits"])
def test_logprobs_modes(plain, ppd, tiny_engine, tiny_ppd, mode):
    params = [
        {"temperature": 0.6, "seed": 4, "top_k": 5, "logprobs": 2},
        {"temperature": 0.0, "logprobs": 1, "presence_penalty": 0.5},
    ]
    more = {"logprobs_mode": mode}
    compare(
        plain,
        ppd,
        {**tiny_engine, **more},
        {**tiny_ppd, **more},
        [{**SAMPLED, **p} for p in params],
    )
