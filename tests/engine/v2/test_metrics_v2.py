"""PPD's metrics on V2, and vLLM's acceptance rate, are about draft tokens."""

from __future__ import annotations

from tests.engine.v2.test_exactness_v2 import GREEDY, prompts


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
