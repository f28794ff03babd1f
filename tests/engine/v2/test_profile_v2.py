"""V2's first start measures the machine before it serves, and drafts by the result."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.engine.conftest import cpu_only
from tests.engine.v2.conftest import same
from tests.engine.v2.engine import V2EngineProcess
from tests.engine.v2.test_exactness_v2 import GREEDY, prompts
from vllm_ppd.adaptive.draft_length import load_buckets
from vllm_ppd.engine import counters
from vllm_ppd.search.latency import LatencyProfile, cache_file
from vllm_ppd.search.menu_search import prior_lengths
from vllm_ppd.trees.menu import TreeMenu


@cpu_only
def test_a_machine_is_measured_before_it_serves(
    plain, tiny_engine, tiny_prompts, tmp_path, capfd
):
    engine: dict[str, Any] = {
        **tiny_engine,
        "max_num_seqs": 2,
        "speculative_config": {
            "method": "ppd",
            "model": tiny_prompts,
            "num_speculative_tokens": 4,
            "online": False,
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

        def schedule(number: int) -> list[int]:
            """The draft lengths that it started with, for one request and for two."""
            again = {**engine, "max_logprobs": 20 + number}
            return process.call("first_schedule", again)

        assert "PPD measures this machine: 100%" in start(1)
        (file,) = (tmp_path / "vllm_ppd" / "profiles").iterdir()
        profile = LatencyProfile.load(file)
        assert cache_file(profile.key).name == file.name
        assert profile.key["runner"] == "V2"
        first = {**engine, "max_logprobs": 21}
        menu = TreeMenu.from_dict(process.call("report", first)["menu"])
        assert profile.rows == (1, *(entry.max_rows for entry in menu.entries))
        assert max(profile.rows) <= 5 and profile.num_running[0] == 1
        table = np.array(profile.seconds)
        # Drafts take more kernels, which the interpreter runs slowly.
        assert (table[:, 1] > table[:, 0]).all()
        # What was measured was no traffic, and decides already.
        counts = process.call("metrics", first, prefix="vllm:")
        assert 0 < counts["vllm:ppd_request_steps"] <= 2 * 8 / counters.EVERY + 2
        assert schedule(1) == prior_lengths(menu, profile, load_buckets(2))

        # A machine that says so is decoded on plainly; on another drafts are free.
        for number, seconds, drafts in ((2, 1.0, False), (3, 0.001, True)):
            rows = [0.001] + [seconds] * (len(profile.rows) - 1)
            content = profile.to_dict() | {"num_running": [1], "seconds": [rows]}
            LatencyProfile.from_dict(content).save(file)
            assert "PPD measures this machine" not in start(number)
            assert [length > 0 for length in schedule(number)] == [drafts] * 2
    finally:
        process.stop()
