"""The V2 runner with PPD decodes what plain vLLM decodes, token for token, in float32.

Prompts are random token ids of a tiny random model, so that texts wander; its trees
are wide enough that a draft token is right every few steps.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.conftest import cpu_only
from tests.engine.v2.conftest import same
from tests.engine.v2.engine import V2EngineProcess

GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


def prompts(count: int, seed: int = 0, length: int | None = None) -> list[Any]:
    """Random prompts of a few to some dozen tokens."""
    generator = random.Random(seed)
    return [
        {
            "prompt_token_ids": [
                generator.randrange(2, 24)
                for _ in range(length or generator.randint(2, 40))
            ]
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_both_runners_same_tokens_from_the_same_trees(
    v1, plain, ppd, tiny_engine, tiny_ppd, batch
):
    requests = prompts(batch, seed=batch)
    params = {**GREEDY, "max_tokens": 24}
    expected = plain.generate(tiny_engine, requests, params)
    before = [process.accepted(tiny_ppd) for process in (v1, ppd)]
    same(expected, v1.generate(tiny_ppd, requests, params))
    same(expected, ppd.generate(tiny_ppd, requests, params))
    gained = [
        process.accepted(tiny_ppd) - a
        for process, a in zip((v1, ppd), before, strict=True)
    ]
    assert gained[0] == gained[1] > 2


def test_it_schedules_ahead(ppd, tiny_ppd):
    assert ppd.call("async_scheduling", tiny_ppd)


def test_requests_come_and_go(check):
    """More requests than slots, of different lengths."""
    params = [{**GREEDY, "max_tokens": 1 + 2 * (i % 5)} for i in range(11)]
    check(prompts(11, seed=5), params)


def test_a_cached_prompt_begins_with_a_plain_step(check, ppd, tiny_ppd):
    """vLLM has no drafts for a prompt that is cached but for one token, and pads none.

    The next step's tree is grown from that one, whose root has no prompt rows.
    """
    requests = prompts(2, seed=9, length=65)
    params = {**GREEDY, "max_tokens": 8}
    for _ in range(2):
        expected = check(requests, params)[0]
    watched = ppd.call(
        "generate_and_watch", tiny_ppd, prompts=requests[:1], params=params
    )
    same(expected[:1], watched["outputs"])
    assert watched["steps"][:3] == [(1, 1, -1), (1, 31, 0), (1, 31, 3)]


def test_continuing_own_output_from_the_prefix_cache(check, ppd, tiny_ppd):
    """The cached blocks of a finished request hold what plain decoding wrote."""
    request = prompts(1, seed=11, length=30)[0]
    first = ppd.generate(tiny_ppd, [request], {**GREEDY, "max_tokens": 36})[0]
    ids = request["prompt_token_ids"] + first["ids"][0]
    longer = [{"prompt_token_ids": ids[:n]} for n in (64, 65, len(ids))]
    check(longer, {**GREEDY, "max_tokens": 6})


def test_requests_that_end_at_the_models_length(check):
    requests = prompts(2, seed=13, length=240)
    expected, _, _ = check(requests, {**GREEDY, "max_tokens": 400})
    assert all(r["finish"] == ["length"] for r in expected)


def test_stop_tokens(check, plain, tiny_engine):
    requests = prompts(4, seed=15)
    probe = plain.generate(tiny_engine, requests, {**GREEDY, "max_tokens": 14})
    params = [
        {**GREEDY, "max_tokens": 14, "stop_token_ids": [p["ids"][0][8]]} for p in probe
    ]
    params[1]["min_tokens"] = 11
    expected, _, _ = check(requests, params)
    assert sum(r["finish"] == ["stop"] for r in expected) >= 3


def test_aborted_neighbours(plain, ppd, tiny_engine, tiny_ppd):
    requests = prompts(5, seed=17)
    params = {**GREEDY, "max_tokens": 12}
    expected = plain.generate(tiny_engine, requests, params)
    actual = ppd.call(
        "abort_midway",
        tiny_ppd,
        prompts=requests,
        params=params,
        abort=[1, 3],
        after_steps=4,
    )
    same([expected[i] for i in (0, 2, 4)], [actual[i] for i in (0, 2, 4)])


def test_small_prefill_chunks_and_preemption(check, ppd, tiny_ppd):
    """Trees share steps with chunks of prefill, are cut by the token budget, and lose
    their requests to a cache that is too small."""
    tight = {
        "max_model_len": 128,
        "max_num_batched_tokens": 80,
        "num_gpu_blocks_override": 8,
        "enable_prefix_caching": False,
    }
    requests = prompts(4, seed=19, length=50)
    params = [{**GREEDY, "max_tokens": 12 + 2 * i} for i in range(4)]
    check(requests, params, **tight)
    assert ppd.call("preemptions", {**tiny_ppd, **tight}) > 0


@cpu_only
def test_without_scheduling_ahead(plain, tiny_engine, tiny_ppd):
    process = V2EngineProcess()
    try:
        assert not process.call("async_scheduling", tiny_ppd)
        requests = prompts(3, seed=21)
        params = {**GREEDY, "max_tokens": 12}
        expected = plain.generate(tiny_engine, requests, params)
        same(expected, process.generate(tiny_ppd, requests, params))
        assert process.accepted(tiny_ppd) > 1
        watched = process.call(
            "generate_and_watch",
            tiny_ppd,
            prompts=requests,
            params=params,
            lengths=[30, 0, 5],
        )
        same(expected, watched["outputs"])
        assert {rows for _, rows, _ in watched["steps"]} >= {1, 6, 31}
    finally:
        process.stop()


@pytest.mark.parametrize("period", [1, 3])
def test_the_schedule_changes_between_steps(plain, ppd, tiny_engine, tiny_ppd, period):
    """Every draft length follows every other, while requests come and go."""
    requests = prompts(11, seed=23)
    params = [{**GREEDY, "max_tokens": 8 + 3 * (i % 5)} for i in range(11)]
    params[2] |= {"temperature": 1.0, "seed": 4}
    params[3] |= {"repetition_penalty": 1.3}
    expected = plain.generate(tiny_engine, requests, params)
    accepted = ppd.accepted(tiny_ppd)
    watched = ppd.call(
        "generate_and_watch",
        tiny_ppd,
        prompts=requests,
        params=params,
        lengths=[0, 30, 5, 30, 0, 5],
        period=period,
    )
    same(expected, watched["outputs"])
    assert {rows for _, rows, _ in watched["steps"]} >= {1, 6, 31}
    assert ppd.accepted(tiny_ppd) > accepted


def test_steps_that_draft_nothing_are_vllms_own(plain, ppd, tiny_engine, tiny_ppd):
    requests = prompts(3, seed=25)
    params = {**GREEDY, "max_tokens": 8}
    expected = plain.generate(tiny_engine, requests, params)
    arguments = {"prompts": requests, "params": params}
    # The first step has the draft length from before the schedule is all zeros.
    ppd.call("hold", tiny_ppd, draft_length=0)
    watched = ppd.call("generate_and_watch", tiny_ppd, **arguments, lengths=[0])
    same(expected, watched["outputs"])
    assert {prompted for _, _, prompted in watched["steps"]} == {-1}
    assert watched["calls"] == {}
    watched = ppd.call("generate_and_watch", tiny_ppd, **arguments)
    assert watched["calls"].keys() >= {"place_tree", "tree_walk", "fill_tree", "move"}
