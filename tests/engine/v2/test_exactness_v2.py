"""The V2 runner with PPD decodes what plain vLLM decodes, token for token, in float32.

Prompts are random token ids of a tiny random model, so that texts wander; its trees
are wide enough that a draft token is right every few steps.
"""

from __future__ import annotations

import pytest

from tests.engine.conftest import cpu_only, engine_with, same
from tests.engine.v2.conftest import GREEDY, prompts
from tests.engine.v2.engine import V2EngineProcess


@pytest.mark.parametrize("batch", [1, 3])
def test_both_runners_same_tokens_from_the_same_trees(
    v1, plain, ppd, plain_engine, ppd_engine, batch
):
    requests = prompts(batch, seed=batch)
    params = {**GREEDY, "max_tokens": 24}
    expected = plain.generate(plain_engine, requests, params)
    before = [process.accepted(ppd_engine) for process in (v1, ppd)]
    for process in (v1, ppd):
        same(expected, process.generate(ppd_engine, requests, params))
    after = [process.accepted(ppd_engine) for process in (v1, ppd)]
    assert after[0] - before[0] == after[1] - before[1] > 2


def test_without_prompt_tokens(v1, plain, ppd, plain_engine, ppd_engine):
    """Drafts from bigrams that are learnt and from n-gram matches, on both runners."""
    none = {"model": None, "tree": None, "num_speculative_tokens": 5, "online": True}
    engine = engine_with(ppd_engine, **none)
    params = [{**GREEDY, "max_tokens": 24} for _ in range(2)]
    # On V2 it has chains.
    params[1]["repetition_penalty"] = 1.1
    what = {"prompts": prompts(2, seed=27), "params": params}
    expected = plain.generate(plain_engine, **what)
    for process in (v1, ppd):
        same(expected, process.generate(engine, **what))
        # Of 48 tokens.
        assert process.accepted(engine) > 4, process is v1


def test_it_schedules_ahead(ppd, ppd_engine):
    assert ppd.call("v2.engine:async_scheduling", ppd_engine)


def test_requests_come_and_go(check):
    """More requests than slots, of different lengths."""
    params = [{**GREEDY, "max_tokens": 1 + 2 * (i % 5)} for i in range(11)]
    check(prompts(11, seed=5), params)


def test_a_cached_prompt_begins_with_a_plain_step(check, watch):
    """vLLM has no drafts for a prompt that is cached but for one token, and pads none.

    The next step's tree is grown from that one, whose root has no prompt rows.
    """
    requests = prompts(2, seed=9, length=65)
    params = {**GREEDY, "max_tokens": 8}
    for _ in range(2):
        check(requests, params)
    steps = watch(requests[:1], params)["steps"]
    assert steps[:3] == [(1, 1, -1), (1, 31, 0), (1, 31, 3)]


def test_continuing_own_output_from_the_prefix_cache(check, ppd, ppd_engine):
    """The cached blocks of a finished request hold what plain decoding wrote."""
    request = prompts(1, seed=11, length=30)[0]
    first = ppd.generate(ppd_engine, [request], {**GREEDY, "max_tokens": 36})[0]
    ids = request["prompt_token_ids"] + first["ids"][0]
    longer = [{"prompt_token_ids": ids[:n]} for n in (64, 65, len(ids))]
    check(longer, {**GREEDY, "max_tokens": 6})


def test_requests_that_end_at_the_models_length(check):
    requests = prompts(2, seed=13, length=240)
    expected, _, _ = check(requests, {**GREEDY, "max_tokens": 400})
    assert all(r["finish"] == ["length"] for r in expected)


def test_stop_tokens(check, plain, plain_engine):
    requests = prompts(4, seed=15)
    base = {**GREEDY, "max_tokens": 14}
    probe = plain.generate(plain_engine, requests, base)
    params = [{**base, "stop_token_ids": [p["ids"][0][8]]} for p in probe]
    params[1]["min_tokens"] = 11
    expected, _, _ = check(requests, params)
    assert sum(r["finish"] == ["stop"] for r in expected) >= 3


def test_aborted_neighbours(plain, ppd, plain_engine, ppd_engine):
    what = {"prompts": prompts(5, seed=17), "params": {**GREEDY, "max_tokens": 12}}
    expected = plain.generate(plain_engine, **what)
    how = {"abort": [1, 3], "after_steps": 4}
    actual = ppd.call("abort_midway", ppd_engine, **what, **how)
    same([expected[i] for i in (0, 2, 4)], [actual[i] for i in (0, 2, 4)])


def test_small_prefill_chunks_and_preemption(check, ppd, ppd_engine):
    """Trees share steps with chunks of prefill, are cut by the token budget, and lose
    their requests to a cache that is too small."""
    tight = {
        "max_model_len": 128,
        "max_num_batched_tokens": 80,
        "num_gpu_blocks_override": 8,
        "enable_prefix_caching": False,
    }
    params = [{**GREEDY, "max_tokens": 12 + 2 * i} for i in range(4)]
    check(prompts(4, seed=19, length=50), params, **tight)
    assert ppd.preemptions({**ppd_engine, **tight}) > 0


@cpu_only
def test_without_scheduling_ahead(start, plain, plain_engine, ppd_engine):
    process = start(V2EngineProcess)
    assert not process.call("v2.engine:async_scheduling", ppd_engine)
    how = {"prompts": prompts(3, seed=21), "params": {**GREEDY, "max_tokens": 12}}
    expected = plain.generate(plain_engine, **how)
    same(expected, process.generate(ppd_engine, **how))
    assert process.accepted(ppd_engine) > 1
    how["lengths"] = [30, 0, 5]
    watched = process.call("v2.engine:generate_and_watch", ppd_engine, **how)
    same(expected, watched["outputs"])
    assert {rows for _, rows, _ in watched["steps"]} >= {1, 6, 31}


@pytest.mark.parametrize("period", [1, 3])
def test_the_schedule_changes_between_steps(watch, ppd, ppd_engine, period):
    """Every draft length follows every other, while requests come and go."""
    params = [{**GREEDY, "max_tokens": 8 + 3 * (i % 5)} for i in range(11)]
    params[2] |= {"temperature": 1.0, "seed": 4}
    params[3] |= {"repetition_penalty": 1.3}
    accepted, lengths = ppd.accepted(ppd_engine), [0, 30, 5, 30, 0, 5]
    watched = watch(prompts(11, seed=23), params, lengths=lengths, period=period)
    assert {rows for _, rows, _ in watched["steps"]} >= {1, 6, 31}
    assert ppd.accepted(ppd_engine) > accepted


def test_steps_that_draft_nothing_are_vllms_own(watch, ppd, ppd_engine):
    requests, params = prompts(3, seed=25), {**GREEDY, "max_tokens": 8}
    # The first step has the draft length from before the schedule is all zeros.
    ppd.call("hold", ppd_engine, draft_length=0)
    watched = watch(requests, params, lengths=[0])
    assert {prompted for _, _, prompted in watched["steps"]} == {-1}
    assert watched["calls"] == {}
    calls = watch(requests, params)["calls"]
    assert calls.keys() >= {"place_tree", "tree_walk", "fill_tree", "move"}
