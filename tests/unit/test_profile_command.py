"""vllm-ppd profile, with an engine that only says what it would have measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from vllm_ppd.cli import main, profile
from vllm_ppd.cli.engines import EngineFailedError
from vllm_ppd.search.latency import LatencyProfile, cache_file

KEY = {"model": "org/base", "device": "Slow Machine", "vllm": "9.9"}
PROFILE = LatencyProfile(
    (1, 8), (1, 2, 16), ((0.004, 0.0051, 0.0123), (0.006, 0.0501, 0.1234)), KEY
)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for real engines: one measures if it is told to, or if it is the first."""

    def measure(settings: dict[str, Any]) -> dict[str, Any]:
        forced = settings["speculative_config"]["profile"] == "measure"
        measured = forced or fake.call_count == 1
        return {"profile": PROFILE.to_dict(), "measured": measured, "menu": {}}

    fake = Mock(side_effect=measure)
    monkeypatch.setattr(profile, "_report", fake)
    return fake


@pytest.fixture
def command(report: Mock, model_folder: Path, prompts_folder: Path, capsys):
    """Run it on a model and its prompt tokens; returns what it printed."""

    def run(*argv: str, status: int = 0) -> str:
        folders = [str(model_folder), str(prompts_folder)]
        done = main.main(["profile", *folders, *argv])
        shown = capsys.readouterr()
        assert done == status, shown.err
        return shown.err if status else shown.out

    return run


def settings(*argv: str) -> dict[str, Any]:
    parser = main._parser("profile")
    return profile.engine_settings(parser.parse_args(["profile", "M", "P", *argv]))


def test_engine_arguments() -> None:
    assert settings() == {
        "model": "M",
        "gpu_memory_utilization": 0.9,
        "speculative_config": {"method": "ppd", "model": "P", "profile": "auto"},
    }
    more = settings(
        *("--engine", "quantization=fp8", "gpu-memory-utilization=0.5"),
        *("--engine", "enforce_eager=true", "--budget", "60", "--force"),
    )
    ppd = more.pop("speculative_config")
    assert (ppd["profile"], ppd["measure_seconds"]) == ("measure", 60.0)
    given = {"quantization": "fp8", "gpu_memory_utilization": 0.5}
    assert more == {"model": "M", "enforce_eager": True, **given}


def test_it_shows_what_the_engine_goes_by(command) -> None:
    shown = command()
    assert f"{cache_file(KEY)} (measured now)" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["1", "4.00", "5.10", "12.3"] in rows
    assert ["8", "6.00", "50.1", "123"] in rows
    assert "(on file; --force measures again)" in command()
    assert "(measured now)" in command("--force")


@pytest.mark.parametrize("error", [EngineFailedError("it died"), ValueError("no")])
def test_an_engine_that_does_not_start(command, report, error) -> None:
    report.side_effect = error
    assert str(error) in command(status=2 if isinstance(error, ValueError) else 1)


def test_a_copy(command, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    command("--out", str(copy))
    assert LatencyProfile.load(copy, KEY) == PROFILE
    command("--out", str(copy), "--overwrite")
