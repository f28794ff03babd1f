"""Tensor parallel on V2: both ranks grow the same trees, and the tokens are vLLM's."""

from __future__ import annotations

from tests.engine.conftest import cpu_only, same
from tests.engine.v2.conftest import GREEDY, prompts
from tests.engine.v2.engine import V2EngineProcess


@cpu_only
def test_two_ranks(two_ranks, start, plain, plain_engine, ppd_engine):
    requests = prompts(3, seed=51)
    params = [
        {**GREEDY, "max_tokens": 24},
        {**GREEDY, "max_tokens": 14, "temperature": 1.0, "seed": 3},
        {**GREEDY, "max_tokens": 10, "repetition_penalty": 1.2},
    ]
    expected = plain.generate(plain_engine, requests, params)
    parallel = {**ppd_engine, **two_ranks}
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ray = two_ranks["distributed_executor_backend"] == "ray"
    process = start(V2EngineProcess, asynchronous=True, ray=ray, **bind)
    # The draft length grows when requests end.
    process.call("draft_within", parallel, max_step_rows=31)
    same(expected, process.generate(parallel, requests, params))
    assert process.accepted(parallel) > 4
