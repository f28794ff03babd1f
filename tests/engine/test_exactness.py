"""Greedy output equals plain vLLM's, token for token, in float32.

Each test decodes the same requests with and without PPD and compares token ids,
lengths and the reasons for which requests ended. Together they decode more than
20,000 tokens (counted in test_enough_tokens_were_compared, which runs last).
"""

from __future__ import annotations

import pytest

from tests.engine.conftest import COMPARED, GREEDY, mixed, same


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_batches_of_mixed_prompt_and_output_lengths(check, texts, batch):
    prompts = mixed(texts, 16)
    params = [{**GREEDY, "max_tokens": 90 + 17 * (i % 9)} for i in range(16)]
    parts = [slice(first, first + batch) for first in range(0, 16, batch)]
    accepted = sum(check(prompts[part], params[part])[2] for part in parts)
    # Speculation really happened.
    assert accepted > 0.1 * sum(each["max_tokens"] for each in params)


def test_repeated_prompts_hit_the_prefix_cache(check, texts):
    prompts = [texts[3][:900], texts[3][:900], texts[3][:1100]] * 2
    for _ in range(2):
        check(prompts, {**GREEDY, "max_tokens": 64})


def test_continuing_own_output_from_the_prefix_cache(check, texts):
    """The cached blocks of a finished request hold what plain decoding wrote."""
    prompt = texts[5][:600]
    expected, _, _ = check([prompt], {**GREEDY, "max_tokens": 200})
    check([prompt + expected[0]["text"][0]], {**GREEDY, "max_tokens": 40})


def test_parallel_samples_of_one_prompt(check, texts):
    params = {"n": 3, "temperature": 0.9, "seed": 11, "max_tokens": 48}
    check(mixed(texts, 4, first=9), params)


def test_ends_and_stops(check, plain, plain_engine, texts):
    """EOS, stop strings, stop tokens, minimum length: all within one batch."""
    prompts = mixed(texts, 12, first=20)
    base = {"temperature": 0.0, "max_tokens": 120}
    probe = plain.generate(plain_engine, prompts, {**base, "ignore_eos": True})
    params = []
    for index, request in enumerate(probe):
        ids, text = request["ids"][0], request["text"][0]
        kinds = [
            base,
            {**base, "stop": ["\n\n", text[100:104]]},
            {**base, "stop": [text[60:63]], "include_stop_str_in_output": True},
            {**base, "stop_token_ids": [ids[25]]},
            {**base, "stop_token_ids": [ids[25], ids[90]], "min_tokens": 40},
            {**base, "min_tokens": 100, "stop": [text[20:30]]},
        ]
        params.append(kinds[index % len(kinds)])
    expected, _, _ = check(prompts, params)
    assert sum(r["finish"] == ["stop"] for r in expected) >= 5


def test_requests_that_end_at_the_models_length(check, texts):
    prompts = [texts[i][:800] for i in range(4)]
    expected, _, _ = check(prompts, {**GREEDY, "max_tokens": 4000}, max_model_len=448)
    assert all(r["finish"] == ["length"] for r in expected)


def test_aborted_neighbours(plain, ppd, plain_engine, ppd_engine, texts):
    arguments = {
        "prompts": mixed(texts, 8, first=40),
        "params": {**GREEDY, "max_tokens": 90},
        "abort": [1, 2, 6],
        # Early: with drafts, requests may be done in two dozen steps.
        "after_steps": 8,
    }
    expected = plain.call("abort_midway", plain_engine, **arguments)
    actual = ppd.call("abort_midway", ppd_engine, **arguments)
    assert sorted(actual) == sorted(expected) == [0, 3, 4, 5, 7]
    same([expected[i] for i in expected], [actual[i] for i in expected])


def test_small_prefill_chunks(check, texts):
    """Trees share steps with chunks of prefill, and are cut by the token budget."""
    params = [{**GREEDY, "max_tokens": 40 + 9 * (i % 5)} for i in range(14)]
    chunks = {"max_num_batched_tokens": 24, "max_num_seqs": 6}
    check(mixed(texts, 14, first=5), params, **chunks)


def test_preemption_and_no_prefix_cache(check, ppd, ppd_engine, texts):
    """A KV cache too small for the batch forces requests out and in again."""
    tiny = {
        "num_gpu_blocks_override": 12,
        "block_size": 32,
        "max_model_len": 320,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
    prompts = [text[:300] for text in texts[30:38]]
    check(prompts, {**GREEDY, "max_tokens": 150}, **tiny)
    assert ppd.preemptions({**ppd_engine, **tiny}) > 0


@pytest.mark.parametrize("name", ["prompt_rows_only", "chain", "wide"])
def test_any_tree(check, texts, trees, name):
    prompts = mixed(texts, 8, first=50)
    params = [{**GREEDY, "max_tokens": 100 + i} for i in range(8)]
    check(prompts, params, {"tree": trees[name]})
    # Sampling visits other branches than greedy decoding does.
    params = [{"temperature": 1.0, "seed": i, "max_tokens": 100} for i in range(8)]
    check(prompts, params, {"tree": trees[name]})


def test_drafts_that_are_noise(check, texts, noise_prompts):
    prompts = mixed(texts, 8, first=60)
    check(prompts, {**GREEDY, "max_tokens": 80}, {"model": noise_prompts})


def test_compiled_engine(check, ppd, ppd_engine, texts):
    """vLLM's default: the model compiled, with soft tokens in the graph."""
    prompts = mixed(texts, 16, first=70)
    compiled = {**ppd_engine, "enforce_eager": False}
    # A starting engine compiles, or loads what was compiled: then these counts rise.
    before = ppd.call("compilations", ppd_engine)
    started = ppd.call("compilations", compiled)
    assert started["num_models_seen"] > before["num_models_seen"]
    assert sum(started.values()) > sum(before.values()) + 1
    check(prompts, {**GREEDY, "max_tokens": 220}, enforce_eager=False)
    # Batches from 16 down to 1, and trees of every size: not one more.
    params = [{**GREEDY, "max_tokens": 10 + 7 * i} for i in range(16)]
    ppd.generate(compiled, prompts, params)
    assert ppd.call("compilations", compiled) == started


def test_bfloat16_differs_only_where_logits_nearly_tie(
    plain, ppd, plain_engine, ppd_engine, texts
):
    """bfloat16 rounds the two orders of summation differently."""
    half = {"dtype": "bfloat16"}
    prompts = mixed(texts, 8, first=80)
    params = {**GREEDY, "max_tokens": 80, "logprobs": 2}
    expected = plain.generate({**plain_engine, **half}, prompts, params)
    actual = ppd.generate({**ppd_engine, **half}, prompts, params)
    equal = 0
    for a, b in zip(expected, actual, strict=True):
        ids, other = a["ids"][0], b["ids"][0]
        assert len(ids) == len(other)
        first = next((i for i, t in enumerate(ids) if t != other[i]), None)
        if first is None:
            equal += 1
            continue
        best, second = sorted(
            (value for value, _ in a["logprobs"][0][first].values()), reverse=True
        )[:2]
        assert best - second < 0.15, f"no near-tie: {best} against {second}"
    assert equal >= 4


def test_enough_tokens_were_compared():
    if COMPARED["tokens"] < 10_000:
        pytest.skip("only part of this file ran")
    assert COMPARED["tokens"] >= 20_000
