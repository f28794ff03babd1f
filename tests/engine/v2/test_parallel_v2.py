"""Tensor parallel on V2: both ranks grow the same trees, and the tokens are vLLM's."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.engine.conftest import cpu_only
from tests.engine.v2.conftest import same
from tests.engine.v2.engine import V2EngineProcess
from tests.engine.v2.test_exactness_v2 import GREEDY, prompts


@cpu_only
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_two_ranks(request, plain, tiny_engine, tiny_ppd, backend):
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
    expected = plain.generate(tiny_engine, requests, params)
    parallel = {
        **tiny_ppd,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": backend,
    }
    process = V2EngineProcess(
        asynchronous=True, ray=backend == "ray", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    try:
        # The draft length grows when requests end.
        process.call("draft_within", parallel, max_step_rows=31)
        same(expected, process.generate(parallel, requests, params))
        assert process.accepted(parallel) > 4
    finally:
        process.stop()
