"""Engines of one process: each has attention that serves trees, or does not start."""

from __future__ import annotations

import pytest

from tests.engine.conftest import cpu_only
from tests.engine.engine_process import EngineFailure, EngineProcess
from tests.engine.v2.conftest import same
from tests.engine.v2.engine import V2EngineProcess
from tests.engine.v2.test_exactness_v2 import GREEDY, prompts

pytestmark = cpu_only


def test_plain_and_ppd_engines_after_each_other(tiny_engine, tiny_ppd):
    """vLLM keeps the backend that it chose for the first engine of a process."""
    requests, params = prompts(5, seed=41), {**GREEDY, "max_tokens": 24}
    process = EngineProcess()
    try:
        expected = process.generate(tiny_engine, requests, params)
        same(expected, process.generate(tiny_ppd, requests, params))
        assert process.accepted(tiny_ppd) > 2
        same(expected, process.generate(tiny_engine, requests, params))
        process.call("keep_stock_backend", tiny_engine)
        with pytest.raises(EngineFailure, match="runs CPUAttentionBackendImpl: leave"):
            process.generate(tiny_ppd, requests, params)
    finally:
        process.stop()


def test_a_v2_engine_without_tree_metadata_does_not_start(tiny_engine, tiny_ppd):
    process = V2EngineProcess()
    try:
        process.call("keep_stock_builder", tiny_engine)
        with pytest.raises(
            EngineFailure, match="runs CPUAttentionMetadataBuilder: leave"
        ):
            process.generate(tiny_ppd, prompts(1), GREEDY)
    finally:
        process.stop()
