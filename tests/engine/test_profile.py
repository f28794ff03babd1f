"""The first start of an engine measures the machine; later ones read what it found."""

from __future__ import annotations

import numpy as np

from tests.engine.conftest import GREEDY, PROMPTS, cpu_only, mixed, same
from vllm_ppd.adaptive.draft_length import load_buckets
from vllm_ppd.engine import counters
from vllm_ppd.search.latency import LatencyProfile, cache_file
from vllm_ppd.search.menu_search import prior_lengths
from vllm_ppd.trees.menu import TreeMenu

pytestmark = cpu_only


class Starts:
    """Starts of one engine, told apart by an argument that changes nothing else."""

    def __init__(self, process, engine, prompts, params, expected):
        self.process, self.engine = process, engine
        self.decode = lambda engine: process.generate(engine, prompts, params)
        self.expected = expected

    def __call__(self, number: int) -> str:
        """Start and decode; what the process says meanwhile."""
        self.process.said()
        self.now = {**self.engine, "max_logprobs": 20 + number}
        same(self.expected, self.decode(self.now))
        return self.process.said()

    def call(self, function: str, **arguments):
        """A call of the last one."""
        return self.process.call(function, self.now, **arguments)


def test_a_machine_is_measured_once(
    start, plain, plain_engine, texts, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speculative = {"method": "ppd", "model": str(PROMPTS), "online": False}
    engine = {
        **plain_engine,
        "max_num_seqs": 2,
        "max_model_len": 1024,
        "speculative_config": {**speculative, "num_speculative_tokens": 7},
    }
    prompts, params = mixed(texts, 4, first=80), {**GREEDY, "max_tokens": 48}
    expected = plain.generate(plain_engine, prompts, params)
    # A process of its own: one that runs already has another cache folder.
    starts = Starts(start(), engine, prompts, params, expected)

    assert "PPD measures this machine: 100%" in starts(1)
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
    steps = starts.call("metrics", prefix="vllm:ppd_request_steps").values()
    assert 0 < sum(steps) <= 4 * 48 / counters.EVERY

    written = file.stat()
    assert "PPD measures this machine" not in starts(2)
    now = file.stat()
    assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)

    file.write_text(file.read_text()[:100])
    said = starts(3)
    assert "ignoring a latency profile and measuring again" in said
    assert "as JSON (" in said and "PPD measures this machine: 100%" in said
    assert LatencyProfile.load(file, profile.key).rows == profile.rows
    assert list(file.parent.iterdir()) == [file]

    # An engine starts with the draft lengths that its profile stands for, also one
    # that it has just measured itself.
    menu = TreeMenu.from_dict(starts.call("report")["menu"])
    lengths = prior_lengths(menu, LatencyProfile.load(file), load_buckets(2))
    assert starts.call("first_schedule") == lengths
