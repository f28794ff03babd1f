"""V2's first start measures the machine for the next one, which plans by it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.engine.conftest import cpu_only
from tests.engine.v2.engine import V2EngineProcess
from tests.engine.v2.test_exactness_v2 import GREEDY, prompts, same
from vllm_ppd.search.latency import LatencyProfile, cache_file


@cpu_only
def test_a_machine_is_measured_for_the_next_start(
    plain, tiny_engine, tiny_prompts, tmp_path, capfd
):
    engine: dict[str, Any] = {
        **tiny_engine,
        "max_num_seqs": 2,
        "speculative_config": {
            "method": "ppd",
            "model": tiny_prompts,
            "num_speculative_tokens": 4,
        },
    }
    requests = prompts(2, seed=71)
    params = {**GREEDY, "max_tokens": 8}
    expected = plain.generate(tiny_engine, requests, params)
    capfd.readouterr()
    process = V2EngineProcess(
        asynchronous=True, XDG_CACHE_HOME=str(tmp_path), VLLM_LOGGING_LEVEL="INFO"
    )
    try:

        def start(number: int) -> str:
            """Start anew, by an argument that changes nothing else; what it says."""
            again = {**engine, "max_logprobs": 20 + number}
            same(expected, process.generate(again, requests, params))
            shown = capfd.readouterr()
            return shown.out + shown.err

        said = start(1)
        assert "PPD measures steps: 100%" in said
        assert "this start's trees are those of a typical machine" in said
        (file,) = (tmp_path / "vllm_ppd" / "profiles").iterdir()
        profile = LatencyProfile.load(file)
        assert cache_file(profile.key).name == file.name
        assert profile.key["runner"] == "V2"
        assert profile.requests == (1, 2) and set(profile.rows) >= {1, 2, 4}
        assert max(profile.rows) <= 5
        table = np.array(profile.seconds)
        # DraftInputs take more kernels, which the interpreter runs slowly.
        assert (table[:, 1] > table[:, 0]).all()
        # What was measured was no traffic.
        counts = process.call("metrics", {**engine, "max_logprobs": 21}, prefix="vllm:")
        assert 0 < counts["vllm:ppd_request_steps"] <= 16

        def speculates(number: int) -> bool:
            report = process.call("report", {**engine, "max_logprobs": 20 + number})
            return any(tier["policies"] for tier in report["plan"]["tiers"])

        # What a typical machine is worth guessing for is not on one that says so.
        assert speculates(1)
        steep = profile.to_dict() | {
            "seconds": [[0.001] + [1.0] * (len(profile.rows) - 1)] * 2
        }
        LatencyProfile.from_dict(steep).save(file)
        assert "PPD measures steps" not in start(2)
        assert not speculates(2)
    finally:
        process.stop()
