"""vllm-ppd profile, with the engine's start replaced by one that files a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_ppd.adaptive.context_cost import ContextCost
from vllm_ppd.cli import main, profile, profile_engine
from vllm_ppd.cli.engines import EngineFailedError
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.latency import LatencyProfile, cache_file

KEY = {"model": "org/base", "device": "Slow Machine", "vllm": "9.9"}
ROWS, SECONDS = (1, 2, 16), ((0.004, 0.0051, 0.0123), (0.006, 0.0501, 0.1234))


class Engine:
    """Stands for real engines: files a profile, as the first one does."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.files = True

    def start(self, settings: dict[str, Any], show: Any) -> None:
        show("measuring steps", 3, 14)
        self.starts.append(settings)
        assert not cache_file(KEY).exists(), "it would not measure"
        if self.error is not None:
            raise self.error
        if self.files:
            factor = len(self.starts)
            seconds = tuple(tuple(factor * t for t in row) for row in SECONDS)
            LatencyProfile((1, 8), ROWS, seconds, KEY).save(cache_file(KEY))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profile_engine, "start_once", fake.start)
    monkeypatch.setattr(profile, "profile_key", lambda settings: KEY)
    return fake


@pytest.fixture
def command(engine: Engine, tmp_path: Path, capsys):
    """Run it on a model and its prompt tokens; returns what it printed."""
    (tmp_path / "model").mkdir()
    base = BaseModelFingerprint("org/base", None, "LlamaForCausalLM", 4, 30, None)
    PromptTokens(torch.zeros(2, 1, 4), base).save(tmp_path / "prompts")

    def run(*argv: str, status: int = 0) -> str:
        where = [str(tmp_path / "model"), str(tmp_path / "prompts")]
        done = main.main(["profile", *where, *argv])
        shown = capsys.readouterr()
        assert done == status, shown.err
        return shown.err if status else shown.out

    return run


def settings(tmp_path: Path, *argv: str) -> dict[str, Any]:
    parser = main._parser("profile")
    return profile.engine_settings(parser.parse_args(["profile", "M", "P", *argv]))


def test_engine_arguments(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    assert plain == {
        "model": "M",
        "dtype": "auto",
        "tensor_parallel_size": 1,
        "speculative_config": {"method": "ppd", "model": "P"},
    }
    more = settings(
        tmp_path,
        *("--engine", "quantization=fp8", "gpu-memory-utilization=0.5", "--eager"),
        *("--engine", "enable_prefix_caching=false", "--dtype", "float32"),
        *("--max-num-seqs", "8", "--max-model-len", "512"),
    )
    assert {k: v for k, v in more.items() if plain.get(k) != v} == {
        "quantization": "fp8",
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_model_len": 512,
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engine", "fp8"], "'fp8' is no engine argument; expected KEY=VALUE"),
        (["--engine", "=fp8"], "'=fp8' is no engine argument"),
        (
            ["--engine", "model=other"],
            "'model=other' is given twice or has a place of its own",
        ),
        (["--engine", "max_num_seqs=4", "--max-num-seqs", "8"], "is given twice"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0; expected at least 1"),
        (["--tensor-parallel-size", "-2"], "--tensor-parallel-size is -2"),
        (["--plot", "p.bmp"], "expected a name ending in .png"),
        (["--out", "."], "--out is .; expected a file"),
    ],
)
def test_errors_are_sentences(command, engine, argv: list[str], message: str) -> None:
    error = command(*argv, status=2)
    assert message in error
    assert error.count("\n") == 1
    assert engine.starts == []


def test_names_that_lead_nowhere_cost_no_start(engine, tmp_path, capsys) -> None:
    assert main.main(["profile", str(tmp_path / "no"), str(tmp_path)]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    assert main.main(["profile", str(tmp_path / "model"), str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert engine.starts == []


def test_it_measures_once(command, engine) -> None:
    shown = command("--eager", "--engine", "kv_cache_dtype=auto")
    (given,) = engine.starts
    assert given["enforce_eager"] is True and given["kv_cache_dtype"] == "auto"
    assert "measuring steps" in shown and "measured now" in shown
    assert str(cache_file(KEY)) in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["1", "4.00", "5.10", "12.3"] in rows
    assert ["8", "6.00", "50.1", "123"] in rows
    assert "What longer contexts cost was not measured." in shown
    again = command()
    assert len(engine.starts) == 1
    assert "measured earlier; --force measures again" in again
    assert ["1", "4.00", "5.10", "12.3"] in [
        line.split() for line in again.splitlines()
    ]


def test_what_steps_without_guesses_cost_in_words() -> None:
    measured = LatencyProfile((1, 8), ROWS, SECONDS, KEY)
    assert profile.bare_sentence(measured) == (
        "Steps of one row take no longer among steps with guesses."
    )
    bare = tuple(1.1 * row[0] for row in SECONDS)
    measured = LatencyProfile((1, 8), ROWS, SECONDS, KEY, bare=bare)
    assert "by 10% with 1 request, by 10% with 8." in profile.bare_sentence(measured)


def test_what_contexts_cost_in_words() -> None:
    cost = ContextCost(128, 2e-6, 1e-6, 1e-6)
    measured = LatencyProfile((1, 8), ROWS, SECONDS, KEY, cost)
    assert profile.context_sentence(measured) == (
        "Contexts had 128 tokens; a thousand more add 2 ms per request to a plain step "
        "and 17 ms to one of 16 rows."
    )


def test_force_measures_again(command, engine) -> None:
    command()
    shown = command("--force")
    assert len(engine.starts) == 2
    assert ["1", "8.00", "10.2", "24.6"] in [
        line.split() for line in shown.splitlines()
    ]
    assert [file.name for file in cache_file(KEY).parent.iterdir()] == [
        cache_file(KEY).name
    ]


@pytest.mark.parametrize("error", [EngineFailedError("it died"), ValueError("no")])
def test_a_failed_start_keeps_what_was_there(command, engine, error) -> None:
    command()
    before = cache_file(KEY).read_bytes()
    engine.error = error
    status = 2 if isinstance(error, ValueError) else 1
    assert str(error) in command("--force", status=status)
    assert cache_file(KEY).read_bytes() == before
    assert len(list(cache_file(KEY).parent.iterdir())) == 1


def test_damaged_and_foreign_files_are_measured_again(command, engine) -> None:
    command()
    good = cache_file(KEY).read_text()
    other = json.dumps({**json.loads(good), "key": {**KEY, "vllm": "1.0"}})
    for content, message in (
        ("{", "is not JSON"),
        (other, "was measured with vllm '1.0', and this is '9.9'"),
    ):
        cache_file(KEY).write_text(content)
        starts = len(engine.starts)
        shown = command()
        assert "Measuring again: " in shown and message in shown
        assert len(engine.starts) == starts + 1
        LatencyProfile.load(cache_file(KEY), KEY)


def test_an_engine_that_files_nothing(command, engine) -> None:
    engine.files = False
    error = command(status=1)
    assert f"filed no profile at {cache_file(KEY)}" in error


def test_copies_and_pictures(command, engine, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    command("--out", str(copy))
    assert LatencyProfile.load(copy) == LatencyProfile.load(cache_file(KEY))
    assert "is there already" in command("--out", str(copy), status=2)
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    command("--plot", str(picture), "--out", str(copy), "--overwrite")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_progress_is_read_off_the_engines_log(tmp_path: Path, monkeypatch) -> None:
    class Logged:
        log = tmp_path / "profiling.log"

    seen: list[tuple] = []
    monkeypatch.setattr(profile_engine, "_POLL_S", 0.005)
    with profile_engine._watched(Logged(), lambda *shown: seen.append(shown)):  # type: ignore
        # No log yet; then loading; then the bar as tqdm rewrites it.
        Logged.log.write_text("Loading shards: 100%| 1/1 [00:00<00:00, 16it/s]\n")
        profile_engine.threading.Event().wait(0.05)
        assert seen == []
        with Logged.log.open("a") as log:
            for done in (0, 3, 9):
                log.write(f"\rPPD measures steps:  1%|# | {done}/35 [00:05<00:16,")
        while not seen:
            profile_engine.threading.Event().wait(0.005)
    assert set(seen) == {("measuring steps", 9, 35)}
