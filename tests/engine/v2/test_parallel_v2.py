"""Tensor parallel on V2: both ranks grow the same trees, and the tokens are vLLM's."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.engine.conftest import cpu_only, same
from tests.engine.v2.conftest import GREEDY, prompts
from tests.engine.v2.engine import V2EngineProcess


@cpu_only
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_two_ranks(request, start, plain, plain_engine, ppd_engine, backend):
    if backend == "ray":
        request.getfixturevalue("only_ray")
        if find_spec("ray") is None:
            pytest.skip("ray is not installed (pip install ray)")
    requests = prompts(3, seed=51)
    params = [
        {**GREEDY, "max_tokens": 24},
        {**GREEDY, "max_tokens": 14, "temperature": 1.0, "seed": 3},
        {**GREEDY, "max_tokens": 10, "repetition_penalty": 1.2},
    ]
    expected = plain.generate(plain_engine, requests, params)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": backend}
    parallel = {**ppd_engine, **ranks}
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = start(V2EngineProcess, asynchronous=True, ray=backend == "ray", **bind)
    # The draft length grows when requests end.
    process.call("draft_within", parallel, max_step_rows=31)
    same(expected, process.generate(parallel, requests, params))
    assert process.accepted(parallel) > 4
