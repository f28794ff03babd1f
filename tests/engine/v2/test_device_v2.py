"""V2 on the device: no host reads, trees by load, and what its steps count."""

from __future__ import annotations

from tests.engine.conftest import engine_with
from tests.engine.v2.conftest import GREEDY, prompts


def test_the_host_reads_nothing_from_the_device(ppd, ppd_engine):
    params = [
        {**GREEDY, "max_tokens": 5},
        {**GREEDY, "max_tokens": 5, "temperature": 1.0, "seed": 1, "logprobs": 2},
        {**GREEDY, "max_tokens": 5, "presence_penalty": 0.5},
    ]
    what = {"prompts": prompts(3, seed=41), "params": params}
    reads = ppd.call("v2.host_reads:host_reads", ppd_engine, **what)
    # vLLM's upper bound of sequence lengths, which lives on the host.
    assert reads == ["sampling.py:_sample:numpy"]
    ppd.call("hold", ppd_engine, draft_length=0)
    assert ppd.call("v2.host_reads:host_reads", ppd_engine, **what) == []


def test_trees_follow_the_load(watch):
    """Requests end one by one: no trees, then chains, then bushy trees."""
    params = [{**GREEDY, "max_tokens": 4 + 5 * i} for i in range(5)]
    by_load = [30, 5, 5, 0, 0, 0, 0, 0]
    watched = watch(prompts(5, seed=43), params, by_load=by_load)
    steps = [(num_reqs, rows) for num_reqs, rows, _ in watched["steps"]]
    assert {(2, 6), (1, 31)} <= set(steps)
    # The draft length is chosen a step ahead, for as many requests as run then.
    assert {num_reqs for num_reqs, rows in steps if rows == 31} == {1}
    assert 6 not in {rows for num_reqs, rows in steps if num_reqs >= 4}


def test_ngrams_and_bigrams(watch, ppd, ppd_engine):
    """The entries of a built menu in turn, with n-gram drafts and a bigram table that
    is learnt, among requests that need chains, or no drafts."""
    settings = {"tree": None, "num_speculative_tokens": 15, "online": True}
    built = engine_with(ppd_engine, **settings)
    requests = prompts(6, seed=45)
    requests[0]["prompt_token_ids"] *= 3
    params = [{**GREEDY, "max_tokens": 20 + 4 * i} for i in range(6)]
    params[1] |= {"frequency_penalty": 0.4}
    params[2] |= {"extra_args": {"ppd": False}}
    params[3] |= {"temperature": 1.0, "seed": 8}
    lengths = ppd.call("draft_lengths", built)
    assert len(lengths) > 2 and lengths[-1] <= 15
    accepted = ppd.accepted(built)
    watched = watch(requests, params, built, lengths=[*lengths, 0], period=2)
    assert {rows - 1 for _, rows, _ in watched["steps"]} >= {0, *lengths}
    assert watched["calls"]["match_ngrams"] > 5
    assert ppd.accepted(built) > accepted
    what = {"prompts": requests[:2], "params": params[:2]}
    reads = ppd.call("v2.host_reads:host_reads", built, **what)
    assert reads == ["sampling.py:_sample:numpy"]


def test_counts_of_both(ppd, ppd_engine):
    params = [{**GREEDY, "max_tokens": 12 + 4 * i} for i in range(3)]
    # Rows without drafts: not counted as speculation, nor as draft tokens.
    params[0]["extra_args"] = {"ppd": False}
    what = {"prompts": prompts(3, seed=61), "params": params}
    seen = ppd.call("v2.engine:count_every_step", ppd_engine, **what)
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
    line = ppd.call("report", ppd_engine)["line"]
    assert line.startswith("PPD: ") and "of draft tokens accepted" in line
