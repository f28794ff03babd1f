"""Each row of docs/sampling.md: the text is plain vLLM's, or the request is refused."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config.reasoning import ReasoningConfig

from tests.engine.conftest import same
from tests.engine.engine_process import EngineProcess
from tests.engine.v2.conftest import GREEDY, prompts
from vllm_ppd.cli.engines import EngineFailedError

TABLE = Path(__file__).parents[3] / "docs" / "sampling.md"
ROWS = re.findall(
    r"^\| `([\w-]+)`[^|]*\| (\w+) \| (\w+) \|$", TABLE.read_text(), re.MULTILINE
)
VALUES: dict[str, Any] = {
    "temperature": 0.7,
    "seed": 5,
    "top_k": 6,
    "top_p": 0.8,
    "min_p": 0.2,
    "min_tokens": 12,
    "stop_token_ids": [8, 18],
    "logit_bias": {9: 2.0, 8: -4.0},
    "allowed_token_ids": list(range(4, 15)),
    "logprobs": 2,
    "prompt_logprobs": 1,
    "logprob_token_ids": [4, 9],
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.6,
    "presence_penalty": 0.8,
    # What a tokenizer makes of them is given too: the tiny model has none.
    "bad_words": ["unused"],
    "thinking_token_budget": 4,
    "extra_args": {"ppd": False},
    "trace_decode_token_ids": [3, 4],
}
# Elsewhere: test_grammar_v2.py and test_exactness.py; below.
OTHERS = {"structured_outputs", "--logits-processors"}
PROCESSORS = {"V1": ["NoRepeat", "Jump"], "V2": ["NoRepeatV2", "JumpV2"]}
BUDGET, THINK, ENOUGH = "thinking_token_budget", 5, [7, 8]


def params_of(name: str) -> list[dict[str, Any]]:
    """Greedy and sampled requests that use the parameter."""
    base = {"ignore_eos": True, "detokenize": False, "max_tokens": 16}
    extra = {name: VALUES[name]}
    if name == "bad_words":
        extra["_bad_words_token_ids"] = [[8], [18], [12, 21]]
    ways = ({"temperature": 0.0, "seed": 2}, {"temperature": 1.0, "seed": 3})
    return [{**base, **way, **extra} for way in ways]


SERVED = [name for name, *modes in ROWS if name in VALUES and "refused" not in modes]


def test_the_table_and_this_test_know_the_same_parameters():
    assert sorted(name for name, *_ in ROWS) == sorted([*VALUES, *OTHERS])


@pytest.mark.parametrize(("name", "mode"), [(n, v2) for n, _, v2 in ROWS])
def test_draft_modes(name, mode):
    from vllm_ppd.engine.v2.request_trees import DraftMode

    if name in VALUES and mode != "refused":
        params = SamplingParams(**params_of(name)[0])
        wanted = {"tree": "TREE", "chain": "CHAIN", "plain": "NONE"}[mode]
        assert DraftMode.of(params) is DraftMode[wanted]


@pytest.fixture(scope="module")
def plain_v1(start_once) -> EngineProcess:
    return start_once()


@pytest.fixture(scope="module")
def thinking() -> dict[str, Any]:
    """Reasoning markers by token ids, as a tokenizer would have given them."""
    reasoning = ReasoningConfig()
    reasoning._reasoning_start_token_ids = [THINK]
    reasoning._reasoning_end_token_ids = ENOUGH
    reasoning._natural_reasoning_end_token_ids = ENOUGH
    reasoning._enabled = True
    return {"reasoning_config": reasoning}


@pytest.fixture(scope="module", params=["V1", "V2"])
def decoded(request, thinking, plain_engine, ppd_engine) -> tuple[Any, ...]:
    """Outputs of both engines by parameter, and the engine with PPD."""
    names = {"V1": ("plain_v1", "v1"), "V2": ("plain", "ppd")}[request.param]
    stock, ours = (request.getfixturevalue(name) for name in names)
    engine = {**ppd_engine, **thinking}
    before = ours.accepted(engine)
    outputs: dict[str, Any] = {}
    # V1 of vLLM 0.32 leaves a budget behind for a request that moves to the place of
    # one that has ended, so budgets have a batch of their own.
    for batch in ([n for n in SERVED if n != BUDGET], [BUDGET]):
        params = [p for name in batch for p in params_of(name)]
        requests = prompts(len(params), seed=37)
        for prompt in requests:
            prompt["prompt_token_ids"].append(THINK)
        expected = stock.generate({**plain_engine, **thinking}, requests, params)
        actual = ours.generate(engine, requests, params)
        for place, name in enumerate(batch):
            part = slice(2 * place, 2 * place + 2)
            outputs[name] = expected[part], actual[part]
    assert ours.accepted(engine) > before
    return outputs, ours, engine


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_custom_logits_processors(runner, request, plain_engine, ppd_engine):
    """For all requests, and for those that ask for one. They read the history."""
    names = {"V1": ("plain_v1", "v1"), "V2": ("plain", "ppd")}[runner]
    stock, ours = (request.getfixturevalue(name) for name in names)
    places = [f"tests.engine.logits_processors:{name}" for name in PROCESSORS[runner]]
    custom = {"logits_processors": places}
    ours_engine = {**ppd_engine, **custom}
    params = [
        {**GREEDY, **way, "max_tokens": 24, "extra_args": {"jump": jump}}
        for way in ({}, {"temperature": 1.0, "seed": 3})
        for jump in (0, 0, 7)
    ]
    requests = prompts(len(params), seed=41)
    before = ours.accepted(ours_engine)
    expected = stock.generate({**plain_engine, **custom}, requests, params)
    same(expected, ours.generate(ours_engine, requests, params))
    assert ours.accepted(ours_engine) > before
    for output, how in zip(expected, params, strict=True):
        ids = output["ids"][0]
        assert not any(a == b for a, b in pairwise(ids)), "no token comes twice"
        assert (ids[9] == how["extra_args"]["jump"]) or not how["extra_args"]["jump"]


@pytest.mark.parametrize("name", SERVED)
def test_text_is_plain_vllms(decoded, name):
    expected, actual = decoded[0][name]
    same(expected, actual)
    if name == BUDGET:
        assert expected[0]["ids"][0][VALUES[BUDGET] :][:2] == ENOUGH


SESSIONS = [[[3, 9, 4], [8, 2], [11, 7, 5, 6], [14]], [[2, 8], [6, 6, 4], [3]]]


def test_sessions_with_input_in_chunks(decoded, request, plain_engine, thinking):
    """A chunk's answer ends at max_tokens, and the next chunk goes on behind it."""
    _, ours, engine = decoded
    stock = request.getfixturevalue("plain_v1")
    arguments = {"sessions": SESSIONS, "params": {**GREEDY, "max_tokens": 9}}
    expected = stock.call("stream_sessions", {**plain_engine, **thinking}, **arguments)
    assert [len(tokens) for tokens in expected.values()] == [36, 27]
    assert ours.call("stream_sessions", engine, **arguments) == expected


def test_what_vllm_refuses(decoded):
    _, ours, engine = decoded
    for name, *modes in ROWS:
        if name in VALUES and "refused" in modes:
            with pytest.raises(EngineFailedError, match=name):
                ours.generate(engine, prompts(1), params_of(name)[0])
