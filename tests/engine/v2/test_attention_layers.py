"""Engines of one process: each has attention that serves trees, or does not start."""

from __future__ import annotations

import pytest

from tests.engine.conftest import cpu_only, same
from tests.engine.v2.conftest import GREEDY, prompts
from tests.engine.v2.engine import V2EngineProcess
from vllm_ppd.cli.engines import EngineFailedError

pytestmark = cpu_only


def test_plain_and_ppd_engines_after_each_other(start, plain_engine, ppd_engine):
    """vLLM keeps the backend that it chose for the first engine of a process."""
    requests, params = prompts(5, seed=41), {**GREEDY, "max_tokens": 24}
    process = start()
    expected = process.generate(plain_engine, requests, params)
    same(expected, process.generate(ppd_engine, requests, params))
    assert process.accepted(ppd_engine) > 2
    same(expected, process.generate(plain_engine, requests, params))
    process.call("keep_stock_backend", plain_engine)
    with pytest.raises(EngineFailedError, match="runs CPUAttentionBackendImpl: leave"):
        process.generate(ppd_engine, requests, params)


def test_a_v2_engine_without_tree_metadata_does_not_start(
    start, plain_engine, ppd_engine
):
    process = start(V2EngineProcess)
    process.call("v2.engine:keep_stock_builder", plain_engine)
    message = "runs CPUAttentionMetadataBuilder: leave"
    with pytest.raises(EngineFailedError, match=message):
        process.generate(ppd_engine, prompts(1), GREEDY)
