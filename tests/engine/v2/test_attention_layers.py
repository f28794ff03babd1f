"""An engine has attention and KV moves that serve trees, or does not start."""

from __future__ import annotations

import pytest

from tests.engine.conftest import cpu_only, same
from tests.engine.engine_process import EngineProcess
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


@pytest.mark.parametrize("runner", [EngineProcess, V2EngineProcess])
def test_the_canary(start, plain, plain_engine, ppd_engine, runner):
    process, params = start(runner), {**GREEDY, "max_tokens": 9}
    for what in ("masks", "moves", "metadata"):
        process.call("spoil_trees", plain_engine, what=what)
        with pytest.raises(EngineFailedError) as refusal:
            process.generate(ppd_engine, prompts(1), params)
        for words in (
            "computes other logits or KV entries in a tree step than in plain steps",
            f"model {plain_engine['model']}, attention backend PPDCPUAttentionBackend",
            "vllm_ppd 0.",
            "serve without PPD, by leaving out --speculative-config",
        ):
            assert words in str(refusal.value)
    # A healthy engine starts in the same process, and its canary leaves nothing behind.
    process.call("spoil_trees", plain_engine)
    assert set(process.call("traces", ppd_engine).values()) == {0}
    expected = plain.generate(plain_engine, prompts(2), params)
    same(expected, process.generate(ppd_engine, prompts(2), params))


def test_the_canary_within_narrow_limits(v1, ppd_engine):
    for limits in (
        {"max_model_len": 8},
        {"max_model_len": 37, "max_num_seqs": 1},
        {"max_model_len": 32, "num_gpu_blocks_override": 2},
    ):
        assert v1.generate({**ppd_engine, **limits}, prompts(1, length=4), GREEDY)
