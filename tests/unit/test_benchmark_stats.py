"""The benchmarks' arithmetic and results file, with fake decoders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare_decoders as compare
import engines
import harness
import pytest
import results


def test_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed in round 2; the ratio does not notice.
    rounds = {
        "plain": [{"tokens_per_s": v} for v in (100.0, 50.0, 100.0)],
        "ppd": [{"tokens_per_s": v} for v in (120.0, 60.0, 130.0)],
    }
    summary = results.summarise(rounds)
    assert summary["ppd"]["ratio"] == {"median": 1.2, "min": 1.2, "max": 1.3}
    assert summary["plain"]["tokens_per_s"]["median"] == 100.0
    assert "ratio" not in results.summarise({"ppd": rounds["ppd"]})["ppd"]
    other = results.summarise({**rounds, "other": rounds["plain"]})
    assert other["ppd"]["ratio_other"] == summary["ppd"]["ratio"]


def test_sameness_sees_lengths() -> None:
    plain = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    cut = results.sameness([(1, 2), (4, 9, 6), (7, 8, 9)], plain)
    assert (cut["identical"], cut["first_difference"]) == (1, 1)


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The benchmarks' clock; while it runs PPD counts three rows for each step."""
    time = [0.0]

    def counters() -> dict[str, float]:
        return {"request_steps": time[0], "rows": 3 * time[0]}

    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: time[0]))
    monkeypatch.setattr(engines, "_counters", counters)
    return time


class FakeEngine:
    """vLLM's engine: requests write 0, and then 1, 2, 3, ... `per_step` at a time."""

    def __init__(self, now: list[float], per_step: int, step_s: float) -> None:
        self.now, self.per_step, self.step_s = now, per_step, step_s
        self.left: dict[str, range] = {}
        self.together: list[int] = []

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        assert params.seed is None and params.ignore_eos
        self.left[name] = range(params.max_tokens)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        self.now[0] += self.step_s
        self.together.append(len(self.left))
        outputs = []
        for name, left in self.left.items():
            count = self.per_step if left[0] else 1
            self.left[name] = left[count:]
            written = SimpleNamespace(token_ids=left[:count])
            rest = {"outputs": [written], "finished": not self.left[name]}
            outputs.append(SimpleNamespace(request_id=name, **rest))
        self.left = {name: left for name, left in self.left.items() if left}
        return outputs


def test_tokens_are_counted_from_vllms_outputs(now) -> None:
    llm = SimpleNamespace(llm_engine=FakeEngine(now, 2, 1.0))
    for _ in range(2):
        batch = engines.Batch.of(
            **engines.generate(llm, [[1]] * 3, {"ignore_eos": True}, 2, [4, 6, 3])
        )
        assert [len(request.ids) for request in batch.requests] == [4, 6, 3]
        assert [len(request.steps) for request in batch.requests] == [3, 4, 2]
        assert (batch.tokens, batch.engine_steps, batch.wall_s) == (13, 5, 5.0)
        # The second request ends when none is left to follow it.
        assert batch.full == (4.0, 4 + 6 + 1)
    assert llm.llm_engine.together == [2, 2, 2, 2, 1] * 2


class Decoder:
    """An engine's near end."""

    def __init__(self, name: str, engine: FakeEngine, log: list[str]) -> None:
        self.name, self.log, self.llm = name, log, SimpleNamespace(llm_engine=engine)

    def generate(self, prompts, params, *, at_once, lengths) -> engines.Batch:
        self.log.append(f"{self.name}{len(prompts)}/{at_once}")
        what = prompts, params, at_once, lengths
        return engines.Batch.of(**engines.generate(self.llm, *what))


@pytest.fixture
def cell(now) -> Any:
    """Called with a batch and a temperature: measures both decoders, and reports."""

    def measure(batch: int = 2, temperature: float = 0.0) -> tuple[dict, list[str]]:
        log: list[str] = []
        fakes = {"plain": FakeEngine(now, 1, 0.01), "ppd": FakeEngine(now, 2, 0.015)}
        decoders = {name: Decoder(name, fake, log) for name, fake in fakes.items()}
        where = harness.Cell(batch, temperature)
        prompts, menus = [[1], [2], [3], [4]], {"ppd": [[5.0, 2.0]]}
        what = decoders, prompts, where, [9] * 4, 3, menus
        measured = harness.measure_cell(*what, pause=lambda: log.append("pause"))
        return harness.report_cell(where, [measured]), log

    return measure


def test_measure_cell_alternates_and_counts(cell) -> None:
    report, log = cell()
    warm_up = ["pause", "plain2/2", "pause", "ppd2/2"]
    turn = ["pause", "plain4/2", "pause", "ppd4/2"]
    assert log == warm_up + 3 * turn
    plain, ppd = report["decoders"]["plain"], report["decoders"]["ppd"]
    assert plain["tokens"]["median"] == ppd["tokens"]["median"] == 36
    assert plain["engine_steps"]["median"] == 18
    assert ppd["engine_steps"]["median"] == 10
    assert plain["acceptance_length"]["median"] == 1.0
    assert ppd["acceptance_length"]["median"] == 2.0
    # Three rows a step lie half way between plain steps and the menu's entry.
    assert ppd["promised_length"]["median"] == 1.5
    assert "promised_length" not in plain
    assert ppd["ratio"]["median"] == pytest.approx(0.09 / 0.075)
    assert ppd["same_ids_as_plain"]["identical"] == 4
    assert len(ppd["rounds"]) == 3
    sampled, _ = cell(temperature=0.7)
    assert sampled["decoders"]["ppd"]["same_ids_as_plain"] is None


def test_lengths_of_texts() -> None:
    lengths = harness.text_lengths(1000, 128, 0.5)
    assert (min(lengths), max(lengths)) == (64, 192)
    # A cell with fewer prompts has the first ones' lengths.
    assert harness.text_lengths(10, 128, 0.5) == lengths[:10]
    assert set(harness.text_lengths(10, 128, 0.0)) == {128}
    assert min(harness.text_lengths(100, 1, 0.9)) == 1


def test_results_file(tmp_path: Path, cell) -> None:
    args = compare.parse_arguments(["--model", str(tmp_path), "--batch", "1,2"])
    cells = [cell(b, t)[0] for t in (0.0, 0.7) for b in (1, 2)]
    what = "compare_decoders", results.environment_card(), vars(args), cells
    content = results.results_document(*what, engines={})
    file = tmp_path / "results.json"
    written = json.dumps(content, allow_nan=False)
    file.write_text(written)
    assert results.read_results(file, "compare_decoders") == json.loads(written)
    # Results are published; folders of the machine that made them are not.
    assert str(tmp_path) not in json.dumps(content)
    assert str(results.ROOT) not in json.dumps(content)
    with pytest.raises(ValueError, match="no results file of step_cost"):
        results.read_results(file, "step_cost")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no results file"):
        results.read_results(tmp_path / "other.json")
    lines = compare.table(content["cells"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.20x (1.20-1.20)" in lines[3] and "| 4/4" in lines[3]


def test_decoder_settings() -> None:
    base = {"model": "m"}

    def speculative(name: str, ppd: Any = None, ngram: Any = None) -> Any:
        settings = harness.decoder_settings(name, base, "p", ppd or {}, ngram or {})
        return settings["speculative_config"]

    assert harness.decoder_settings("plain", base, "p", {}, {}) == base
    ours = {"method": "ppd", "model": "p"}
    assert speculative("ppd", {"tree": "t"}) == {**ours, "tree": "t"}
    assert speculative("fixed")["online"] is False
    assert speculative("other", {"tree": "t"}) == ours
    lookup = {"prompt_lookup_max": 2}
    assert speculative("ngram", None, lookup)["prompt_lookup_max"] == 2


@pytest.mark.parametrize(
    "argv",
    ["--rounds 2", "--starts 0", "--batch 0", "--decoders plain,x", "--other /none"],
)
def test_bad_arguments(argv: str) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.parse_arguments(argv.split())
    assert stop.value.code == 2


def test_prompts_are_the_same_every_time(tmp_path: Path) -> None:
    texts = ["".join(f"line {i} of text {t}\n" for i in range(200)) for t in range(5)]
    passages = harness.pick_texts([*texts, "short"], 5, 300)
    assert passages == harness.pick_texts([*texts, "short"], 5, 300)
    assert len(set(passages)) == 5
    assert all(len(p) == 300 and p.startswith("line ") for p in passages)
    # More than there are texts: several from each, from other places.
    assert len(set(harness.pick_texts(texts, 600, 300))) == 600
    with pytest.raises(ValueError, match="and 2000 prompts are asked for"):
        harness.pick_texts(texts, 2000, 300)
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab"}\n{"prompt": "cde"}\n')
    prompts = harness.encode_prompts(tokenizer, file, 3, 64)
    assert [len(ids) for ids in prompts] == [2, 3, 2]
    file.write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match="line 1 has neither"):
        harness.encode_prompts(tokenizer, file, 3, 64)
