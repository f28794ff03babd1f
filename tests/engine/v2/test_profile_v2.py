"""V2's first start measures the machine before it serves, and drafts by the result."""

from __future__ import annotations

import numpy as np

from tests.engine.conftest import cpu_only
from tests.engine.test_profile import Starts
from tests.engine.v2.conftest import GREEDY, prompts
from tests.engine.v2.engine import V2EngineProcess
from vllm_ppd.adaptive.draft_length import load_buckets
from vllm_ppd.engine import counters
from vllm_ppd.search.latency import LatencyProfile, cache_file
from vllm_ppd.search.menu_search import prior_lengths
from vllm_ppd.trees.menu import TreeMenu


@cpu_only
def test_a_machine_is_measured_before_it_serves(
    start, plain, plain_engine, tiny_prompts, tmp_path
):
    speculative = {"method": "ppd", "model": tiny_prompts, "online": False}
    engine = {
        **plain_engine,
        "max_num_seqs": 2,
        "speculative_config": {**speculative, "num_speculative_tokens": 4},
    }
    requests, params = prompts(2, seed=71), {**GREEDY, "max_tokens": 8}
    expected = plain.generate(plain_engine, requests, params)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "VLLM_LOGGING_LEVEL": "INFO"}
    process = start(V2EngineProcess, asynchronous=True, **environment)
    starts = Starts(process, engine, requests, params, expected)

    assert "PPD measures this machine: 100%" in starts(1)
    (file,) = (tmp_path / "vllm_ppd" / "profiles").iterdir()
    profile = LatencyProfile.load(file)
    assert cache_file(profile.key).name == file.name
    assert profile.key["runner"] == "V2"
    menu = TreeMenu.from_dict(starts.call("report")["menu"])
    assert profile.rows == (1, *(entry.max_rows for entry in menu.entries))
    assert max(profile.rows) <= 5 and profile.num_running[0] == 1
    table = np.array(profile.seconds)
    # Drafts take more kernels, which the interpreter runs slowly.
    assert (table[:, 1] > table[:, 0]).all()
    # What was measured was no traffic, and decides already.
    steps = starts.call("metrics", prefix="vllm:ppd_request_steps").values()
    assert 0 < sum(steps) <= 2 * 8 / counters.EVERY + 2
    lengths = prior_lengths(menu, profile, load_buckets(2))
    assert starts.call("first_schedule") == lengths

    # A machine that says so is decoded on plainly; on another drafts are free.
    for number, seconds, drafts in ((2, 1.0, False), (3, 0.001, True)):
        rows = [0.001] + [seconds] * (len(profile.rows) - 1)
        content = profile.to_dict() | {"num_running": [1], "seconds": [rows]}
        LatencyProfile.from_dict(content).save(file)
        assert "PPD measures this machine" not in starts(number)
        schedule = starts.call("first_schedule")
        assert [length > 0 for length in schedule] == [drafts] * 2
