"""Sampling on V2 is vLLM's sampling: same draws, same scores, with and without PPD.

V2 draws a token's noise from the request's seed and the token's position, so equal
seeds must give equal tokens whatever was drafted.
"""

from __future__ import annotations

import pytest

from tests.engine.test_sampling import close
from tests.engine.v2.conftest import prompts

SAMPLED = {"ignore_eos": True, "detokenize": False, "max_tokens": 12}
DIFFERENT_WAYS = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_k": 12},
    {"temperature": 1.2, "seed": 3, "top_p": 0.8, "logprobs": 2},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "seed": 5, "min_tokens": 8, "stop_token_ids": [3, 4]},
    {"temperature": 1.0, "seed": 6, "allowed_token_ids": list(range(5, 15))},
]
# Scores of emitted, prompt and chosen tokens.
SCORES = [
    {"temperature": 1.0, "seed": 1, "logprobs": 4, "prompt_logprobs": 2},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.0, "logprob_token_ids": [4, 9], "logprobs": 2},
    {"temperature": 0.0},
]
# Requests that depend on their history have chains, beside others that have trees.
HISTORIES = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 8, "presence_penalty": 0.8},
    {"temperature": 0.0, "frequency_penalty": 0.6, "logprobs": 1},
    {"temperature": 1.0, "seed": 9},
    {"temperature": 0.0},
]
OPTED_OUT = [{"temperature": 0.0, "extra_args": {"ppd": False}}] * 2
LOGPROBS = [
    {"temperature": 0.6, "seed": 4, "top_k": 5, "logprobs": 2},
    {"temperature": 0.0, "logprobs": 1, "presence_penalty": 0.5},
]


@pytest.mark.parametrize(
    ("params", "mode", "accepts"),
    [
        pytest.param(DIFFERENT_WAYS, None, True, id="a batch of different ways"),
        pytest.param(SCORES, None, True, id="scores"),
        pytest.param(HISTORIES, None, True, id="what depends on the history"),
        pytest.param(OPTED_OUT, None, False, id="requests that opt out"),
        pytest.param(LOGPROBS, "processed_logprobs", None, id="processed logprobs"),
        pytest.param(LOGPROBS, "raw_logits", None, id="raw logits"),
    ],
)
def test_same_draws_and_scores(check, params, mode, accepts):
    """accepts: whether draft tokens must be accepted, or none; None: either."""
    more = {} if mode is None else {"logprobs_mode": mode}
    params = [{**SAMPLED, **p} for p in params]
    expected, actual, accepted = check(prompts(len(params), seed=31), params, **more)
    close(expected, actual)
    if accepts is not None:
        assert accepted > 2 if accepts else accepted == 0
