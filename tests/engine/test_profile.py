"""The first start of an engine measures the machine; later ones read what it found."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.conftest import PROMPTS, cpu_only
from tests.engine.engine_process import EngineProcess
from tests.engine.test_exactness import GREEDY, mixed, same
from vllm_ppd.adaptive.draft_length import load_buckets
from vllm_ppd.engine import counters
from vllm_ppd.search.latency import LatencyProfile, cache_file
from vllm_ppd.search.menu_search import prior_lengths
from vllm_ppd.trees.menu import TreeMenu

pytestmark = cpu_only


def test_a_machine_is_measured_once(
    plain, plain_engine, ppd_engine, texts, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = {
        **ppd_engine,
        "max_num_seqs": 2,
        "max_model_len": 1024,
        "speculative_config": {
            "method": "ppd",
            "model": str(PROMPTS),
            "num_speculative_tokens": 7,
            "online": False,
        },
    }
    prompts = mixed(texts, 4, first=80)
    params = {**GREEDY, "max_tokens": 48}
    expected = plain.generate(plain_engine, prompts, params)
    capfd.readouterr()
    # A process of its own: one that runs already has another cache folder.
    process = EngineProcess()
    try:

        def start(number: int) -> str:
            """Start anew, by an argument that changes nothing else; what it says."""
            again = {**engine, "max_logprobs": 20 + number}
            same(expected, process.generate(again, prompts, params))
            shown = capfd.readouterr()
            return shown.out + shown.err

        assert "PPD measures this machine: 100%" in start(1)
        (file,) = (tmp_path / "vllm_ppd" / "profiles").iterdir()
        profile = LatencyProfile.load(file)
        assert cache_file(profile.key) == file
        most = profile.rows[-1]
        assert profile.num_running == (1, 2)
        assert profile.rows == (*(n for n in (1, 2, 4) if n < most), most)
        table = np.array(profile.seconds)
        assert (np.diff(table, axis=0) >= 0).all()
        assert (np.diff(table, axis=1) >= 0).all()
        # A dozen rows in all take longer than one, on any machine.
        assert table[-1, -1] > table[0, 0]
        assert profile.key["dtype"] == "torch.float32" and profile.key["eager"] is True
        # What was measured was no traffic.
        counts = process.call("metrics", {**engine, "max_logprobs": 21}, prefix="vllm:")
        assert 0 < counts["vllm:ppd_request_steps"] <= 4 * 48 / counters.EVERY

        written = file.stat()
        assert "PPD measures this machine" not in start(2)
        now = file.stat()
        assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)

        file.write_text(file.read_text()[:100])
        said = start(3)
        assert "ignoring a latency profile and measuring again" in said
        assert "is not JSON" in said and "PPD measures this machine: 100%" in said
        assert LatencyProfile.load(file, profile.key).rows == profile.rows
        assert list(file.parent.iterdir()) == [file]

        # An engine starts with the draft lengths that its profile stands for, also one
        # that it has just measured itself.
        schedule = process.call("first_schedule", {**engine, "max_logprobs": 23})
        menu = process.call("report", {**engine, "max_logprobs": 23})["menu"]
        measured = LatencyProfile.load(file)
        expected = prior_lengths(TreeMenu.from_dict(menu), measured, load_buckets(2))
        assert schedule == expected
    finally:
        process.stop()


def test_a_profile_that_the_user_names_is_checked(ppd, ppd_engine, tmp_path):
    foreign = tmp_path / "foreign.json"
    LatencyProfile((1,), (1, 8), ((0.1, 0.2),), {"model": "another"}).save(foreign)
    speculative = {**ppd_engine["speculative_config"], "profile": str(foreign)}
    engine = {**ppd_engine, "speculative_config": speculative}
    with pytest.raises(Exception, match=r"was measured with .*vllm-ppd profile"):
        ppd.call("generate", engine, prompts=["def"], params={"max_tokens": 1})
