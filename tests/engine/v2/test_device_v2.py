"""V2 on the device: no host reads, trees by load, and what its steps count."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.v2.conftest import same
from tests.engine.v2.test_exactness_v2 import GREEDY, prompts


@pytest.fixture(scope="module")
def built(tiny_ppd: dict[str, Any]) -> dict[str, Any]:
    """An engine with a built menu: entries of 2 to 16 rows, n-gram drafts, and a bigram
    table that it learns."""
    speculative = {
        **{k: v for k, v in tiny_ppd["speculative_config"].items() if k != "tree"},
        "num_speculative_tokens": 15,
        "online": True,
    }
    return {**tiny_ppd, "speculative_config": speculative}


def test_the_host_reads_nothing_from_the_device(ppd, tiny_ppd):
    requests = prompts(3, seed=41)
    params = [
        {**GREEDY, "max_tokens": 5},
        {**GREEDY, "max_tokens": 5, "temperature": 1.0, "seed": 1, "logprobs": 2},
        {**GREEDY, "max_tokens": 5, "presence_penalty": 0.5},
    ]
    reads = ppd.call("host_reads", tiny_ppd, prompts=requests, params=params)
    # vLLM's upper bound of sequence lengths, which lives on the host.
    assert reads == ["sampling.py:_sample:numpy"]
    ppd.call("hold", tiny_ppd, draft_length=0)
    assert ppd.call("host_reads", tiny_ppd, prompts=requests, params=params) == []


def test_trees_follow_the_load(plain, ppd, tiny_engine, tiny_ppd):
    """Requests end one by one: no trees, then chains, then bushy trees."""
    requests = prompts(5, seed=43)
    params = [{**GREEDY, "max_tokens": 4 + 5 * i} for i in range(5)]
    expected = plain.generate(tiny_engine, requests, params)
    watched = ppd.call(
        "generate_and_watch",
        tiny_ppd,
        prompts=requests,
        params=params,
        by_load=[30, 5, 5, 0, 0, 0, 0, 0],
    )
    same(expected, watched["outputs"])
    steps = [(num_reqs, rows) for num_reqs, rows, _ in watched["steps"]]
    assert {(2, 6), (1, 31)} <= set(steps)
    # The draft length is chosen a step ahead, for as many requests as run then.
    assert {num_reqs for num_reqs, rows in steps if rows == 31} == {1}
    assert 6 not in {rows for num_reqs, rows in steps if num_reqs >= 4}


def test_ngrams_and_bigrams(plain, ppd, tiny_engine, built):
    """The menu's entries in turn, among requests that need chains, or no drafts."""
    requests = prompts(6, seed=45)
    requests[0]["prompt_token_ids"] *= 3
    params = [{**GREEDY, "max_tokens": 20 + 4 * i} for i in range(6)]
    params[1] |= {"frequency_penalty": 0.4}
    params[2] |= {"extra_args": {"ppd": False}}
    params[3] |= {"temperature": 1.0, "seed": 8}
    expected = plain.generate(tiny_engine, requests, params)
    lengths = ppd.call("draft_lengths", built)
    assert len(lengths) > 2 and lengths[-1] <= 15
    accepted = ppd.accepted(built)
    watched = ppd.call(
        "generate_and_watch",
        built,
        prompts=requests,
        params=params,
        lengths=[*lengths, 0],
        period=2,
    )
    same(expected, watched["outputs"])
    assert {rows - 1 for _, rows, _ in watched["steps"]} >= {0, *lengths}
    assert watched["calls"]["match_ngrams"] > 5
    assert ppd.accepted(built) > accepted
    reads = ppd.call("host_reads", built, prompts=requests[:2], params=params[:2])
    assert reads == ["sampling.py:_sample:numpy"]


def test_counts_of_both(ppd, tiny_ppd):
    requests = prompts(3, seed=61)
    params = [{**GREEDY, "max_tokens": 12 + 4 * i} for i in range(3)]
    # Rows without drafts: not counted as speculation, nor as draft tokens.
    params[0]["extra_args"] = {"ppd": False}
    seen = ppd.call("count_every_step", tiny_ppd, prompts=requests, params=params)
    # The first request has 12 steps and no drafts; the others' steps have some, but
    # for those that read their prompts.
    steps_with_drafts = seen["vllm:ppd_num_prompted_steps"]
    assert steps_with_drafts == seen["vllm_num_drafts"] - 11 > 10
    assert seen["vllm:ppd_draft_tokens"] == seen["vllm_num_draft_tokens"]
    assert seen["vllm:ppd_accepted_tokens"] == seen["vllm_num_accepted_tokens"] > 2
    steps, emitted = seen["vllm:ppd_request_steps"], seen["vllm:ppd_emitted_tokens"]
    assert emitted - steps == seen["vllm:ppd_accepted_tokens"]
    # Most rows are prompt rows and padding.
    assert seen["vllm:ppd_rows"] > 4 * (steps + seen["vllm:ppd_draft_tokens"])
    line = ppd.call("report", tiny_ppd)["line"]
    assert line.startswith("PPD: ") and "of draft tokens accepted" in line
