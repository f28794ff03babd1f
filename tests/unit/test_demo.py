"""`vllm-ppd demo` without engines: its prompts, its words and its pictures."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_ppd.cli import demo, demo_view, main
from vllm_ppd.cli.demo_view import Comparison, verdict
from vllm_ppd.cli.engines import (
    EngineFailedError,
    EngineProcess,
    engine_settings,
    sentence,
)
from vllm_ppd.engine.generation import Generation, Step
from vllm_ppd.train.settings import cpu_dtype


def test_a_model_that_answers_no_questions(capsys) -> None:
    model = Path(__file__).parents[2] / "demo_model" / "model"
    assert main.main(["demo", "--model", str(model)]) == 2
    assert "no chat template, so it answers no questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 avx512f", "float32"),
        ("fpu avx512f avx512_bf16", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16"),
        (None, "float32"),
    ],
)
def test_data_type_by_what_the_cpu_can_do(tmp_path: Path, flags, dtype: str) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512_bf16\n")
    assert cpu_dtype(file) == dtype


@pytest.mark.parametrize("given", ["auto", "bfloat16"])
def test_settings_for_this_machine(monkeypatch, given: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings, notes = engine_settings("model", given, eager=True)
    assert settings["dtype"] == (cpu_dtype() if given == "auto" else given)
    assert [note.split(",")[0] for note in notes] == (
        [f"data type {cpu_dtype()}"] if given == "auto" else []
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert engine_settings("model", given)[0]["dtype"] == given


def generation(counts: list[int], step_s: float) -> Generation:
    """Ids 0, 1, 2, ... in steps of the given sizes."""
    steps, done = [], 0
    for number, count in enumerate(counts, start=1):
        ids = tuple(range(done, done + count))
        texts = [f"<{i}>" for i in ids]
        steps.append(Step(number * step_s, ids, "".join(texts[:-1]), texts[-1]))
        done += count
    return Generation(tuple(steps))


PLAIN = generation([1] * 7, 0.010)
PPD = generation([1, 3, 1, 2], 0.014)


@pytest.mark.parametrize(
    ("ids", "share"),
    [([1, 2, 3, 4, 5], 0.0), ([1, 2, 3], 0.0), ([7] * 13, 0.9), ([], 0.0)],
)
def test_repeated(ids: list[int], share: float) -> None:
    assert Generation((Step(1.0, tuple(ids), "", ""),)).repeated == pytest.approx(share)
    assert Generation(()).acceptance_length == 1.0


def test_verdict_is_honest() -> None:
    faster = Comparison("p", (PLAIN,) * 3, (PPD,) * 3)
    assert faster.first_difference is None
    assert faster.speedup == pytest.approx(0.070 / 0.056)
    said = " ".join(verdict([faster], "bfloat16", 0))
    assert "1.25x as fast: 2.00 tokens per step" in said
    assert "14.0 ms instead of 10.0 ms" in said
    assert "All 7 token ids are identical" in said

    slower = Comparison("p", (PLAIN,), (generation([1, 3, 1, 2], 0.035),))
    assert "slower here (0.50x)" in verdict([slower], "bfloat16", 0)[0]
    level = Comparison("p", (PLAIN,), (PLAIN,))
    assert "no faster here (1.00x)" in verdict([level], "bfloat16", 0)[0]
    assert "same distribution" in verdict([level], "bfloat16", 0.7)[1]


def test_differing_ids_are_said_and_placed() -> None:
    other = generation([1, 3], 0.01)
    cut = Comparison("p", (PLAIN,), (other,))
    assert cut.first_difference == 4
    said = verdict([cut], "bfloat16", 0)
    assert "identical for 0 of 1 prompts. In bfloat16 a step" in said[1]
    assert "please report" in verdict([cut], "float32", 0)[1]


@pytest.mark.parametrize("width", [60, 120])
def test_panels_and_table(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width)
    c = Comparison("import os\n\ndef f(x):\n", (PLAIN,), (PPD,))
    console.print(demo_view.frame(console, c, 0.03, "slowly"))
    demo_view.replay(console, c)
    console.print(demo_view.summary([c, c], greedy=True))
    shown = out.getvalue()
    for word in ("def f(x):", "3 tokens, 3 steps", "4 tokens, 2 steps", "slowly", "14"):
        assert word in shown
    now, end = shown.split("slowly")
    assert "<4>" not in now and "<6>" in end and "7 tokens, 4 steps" in end
    assert "\x1b" not in shown
    assert "identical" in shown or width == 60


def test_pydantic_errors_become_sentences() -> None:
    report: Any = ValueError("1 validation error")
    report.errors = lambda: [{"msg": "Value error, max_model_len is too large"}]
    assert sentence(report) == "max_model_len is too large"
    assert sentence(RuntimeError("plain words")) == "plain words"


class FakeEngine:
    """An engine whose `start` works, is refused, fails, dies or hangs."""

    def __init__(self, settings: dict[str, str]):
        print("Traceback (most recent call last)")
        print("(Worker) ValueError: the root cause")
        print("RuntimeError: engine core failed", flush=True)
        self.mode = settings["mode"]

    def start(self) -> str:
        if self.mode == "refused":
            raise ValueError("no such model")
        if self.mode == "failed":
            raise RuntimeError("see above")
        if self.mode == "dies":
            os._exit(1)
        if self.mode == "hangs":
            time.sleep(60)
        return "float32"

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[1, 2] for _ in texts]

    def generate(self, prompt: list[int], params: dict[str, float]) -> Generation:
        return PPD


def fake_engine(mode: str, folder: Path) -> EngineProcess:
    return EngineProcess("an engine", {"mode": mode}, folder, FakeEngine)


def test_conversation_with_engines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "_SETTLE_S", 0.0)
    pair = [fake_engine("works", tmp_path) for _ in range(2)]
    assert demo.start(pair) == "float32"
    assert pair[0].call("encode", ["x"]) == [[1, 2]]
    (comparison,) = demo.measure(pair, ["x"], [[1, 2]], {}, rounds=2)
    assert comparison == Comparison("x", (PPD,) * 2, (PPD,) * 2)
    for engine in pair:
        engine.close()


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("refused", ValueError, "^no such model$"),
        ("failed", EngineFailedError, "ValueError: the root cause; its log is"),
        ("dies", EngineFailedError, "ValueError: the root cause; its log is"),
    ],
)
def test_failing_engines(tmp_path: Path, mode: str, kind: type, words: str) -> None:
    engine = fake_engine(mode, tmp_path)
    with pytest.raises(kind, match=words):
        engine.call("start")
    engine.close()
    engine.close()


def test_a_hanging_engine_is_ended(tmp_path: Path) -> None:
    engine = fake_engine("hangs", tmp_path)
    engine.send("start")
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 10
