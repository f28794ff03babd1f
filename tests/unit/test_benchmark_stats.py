"""The benchmarks' arithmetic and results file, with fake decoders."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ppd.cli.generation import Batch, Generation, Step

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# The scripts import each other as siblings, as they do when run.
sys.path.insert(0, str(BENCHMARKS))
result_file: Any = importlib.import_module("result_file")
stats: Any = importlib.import_module("stats")
harness: Any = importlib.import_module("harness")
environment: Any = importlib.import_module("environment")
compare: Any = importlib.import_module("compare_decoders")
plot: Any = importlib.import_module("plot_results")


def test_spread() -> None:
    assert stats.Spread.of([3.0, 1.0, 2.0]).to_dict() == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
    }
    with pytest.raises(ValueError, match="at least one"):
        stats.Spread.of([])


def test_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed in round 2; the ratio does not notice.
    rounds = {
        "plain": [{"tokens_per_s": v} for v in (100.0, 50.0, 100.0)],
        "ppd": [{"tokens_per_s": v} for v in (120.0, 60.0, 130.0)],
    }
    found = stats.summarise(rounds)
    assert found["ppd"]["ratio"] == {"median": 1.2, "min": 1.2, "max": 1.3}
    assert found["plain"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert found["plain"]["tokens_per_s"]["median"] == 100.0
    assert "ratio" not in stats.summarise({"ppd": rounds["ppd"]})["ppd"]
    with pytest.raises(ValueError, match="argument 2"):
        stats.ratios([1.0, 2.0], [1.0])


def test_sameness_sees_lengths() -> None:
    plain = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert vars(stats.Sameness.of(plain, plain)) == {
        "identical": 3,
        "requests": 3,
        "first_difference": None,
    }
    cut = stats.Sameness.of([(1, 2), (4, 9, 6), (7, 8, 9)], plain)
    assert (cut.identical, cut.first_difference) == (1, 1)
    with pytest.raises(ValueError, match="zip"):
        stats.Sameness.of(plain[:1], plain)


class FakeDecoder:
    """Writes 0, 1, 2, ... `per_step` at a time, each step taking `step_s`."""

    def __init__(self, name: str, per_step: int, step_s: float, log: list[str]):
        self.name, self.per_step, self.step_s, self.log = name, per_step, step_s, log

    def generate(self, prompts, params, *, at_once=None, lengths=None) -> Batch:
        self.log.append(f"{self.name}{len(prompts)}/{at_once}")
        assert params["ignore_eos"]
        assert len(lengths) == len(prompts)
        assert len(set(lengths)) == 1, "this fake writes equally long texts"
        sizes, left = [1], lengths[0] - 1
        while left > 0:
            sizes.append(min(self.per_step, left))
            left -= sizes[-1]
        steps, at = [], 0
        for number, size in enumerate(sizes, start=1):
            ids = tuple(range(at, at + size))
            steps.append(Step(number * self.step_s, ids, "", "x"))
            at += size
        request = Generation(tuple(steps))
        steps_of_all = len(sizes) * -(-len(prompts) // at_once)
        wall = steps_of_all * self.step_s
        return Batch(wall, steps_of_all, (request,) * len(prompts))


def start(where: Any, ppd_step_s: float = 0.015) -> tuple[dict, list[str]]:
    log: list[str] = []
    engines = {
        "plain": FakeDecoder("plain", 1, 0.01, log),
        "ppd": FakeDecoder("ppd", 2, ppd_step_s, log),
    }
    prompts = [[1], [2], [3], [4]]
    found = harness.measure_cell(
        engines, prompts, where, [9] * 4, 3, pause=lambda: log.append("pause")
    )
    return found, log


def cell(batch: int = 2, temperature: float = 0.0) -> tuple[dict, list[str]]:
    where = harness.Cell(batch, temperature)
    found, log = start(where)
    return harness.report(where, [found]), log


def test_measure_cell_alternates_and_counts() -> None:
    found, log = cell()
    warm_up = ["pause", "plain2/2", "pause", "ppd2/2"]
    turn = ["pause", "plain4/2", "pause", "ppd4/2"]
    assert log == warm_up + 3 * turn
    plain, ppd = found["decoders"]["plain"], found["decoders"]["ppd"]
    assert plain["tokens"]["median"] == ppd["tokens"]["median"] == 36
    assert plain["engine_steps"]["median"] == 18
    assert ppd["engine_steps"]["median"] == 10
    assert plain["tokens_per_step"]["median"] == 1.0
    assert ppd["tokens_per_step"]["median"] == 2.0
    assert ppd["ratio"]["median"] == pytest.approx(0.09 / 0.075)
    assert ppd["same_ids_as_plain"]["identical"] == 4
    assert len(ppd["rounds"]) == 3


def test_engines_that_start_anew() -> None:
    where = harness.Cell(2, 0.0)
    lucky = start(where, ppd_step_s=0.0125)[0]
    found = harness.report(where, [start(where)[0], lucky])
    ppd = found["decoders"]["ppd"]
    assert ppd["ratio_by_start"] == [1.2, 1.44]
    assert found["decoders"]["plain"]["ratio_by_start"] == [1.0, 1.0]
    assert len(ppd["rounds"]) == 6
    assert ppd["ratio"] == {"median": 1.32, "min": 1.2, "max": 1.44}


def test_lengths_of_texts() -> None:
    lengths = harness.text_lengths(1000, 128, 0.5)
    assert (min(lengths), max(lengths)) == (64, 192)
    assert sum(lengths) / 1000 == pytest.approx(128, rel=0.03)
    # A cell with fewer prompts has the first ones' lengths.
    assert harness.text_lengths(10, 128, 0.5) == lengths[:10]
    assert set(harness.text_lengths(10, 128, 0.0)) == {128}
    assert min(harness.text_lengths(100, 1, 0.9)) == 1


def test_sampled_ids_are_not_compared() -> None:
    found, _ = cell(temperature=0.7)
    assert found["decoders"]["ppd"]["same_ids_as_plain"] is None


def results(tmp_path: Path) -> tuple[dict, Path]:
    card = {"worker_cpus": [0], "vllm": "0.32.0", "torch": "2.13", "dtype": "bfloat16"}
    card |= {"device": "cpu", "eager": False}
    args = compare.parse_arguments(["--model", str(tmp_path), "--batch", "1,2"])
    cells = [cell(b, t)[0] for t in (0.0, 0.7) for b in (1, 2)]
    content = harness.document(
        "compare_decoders",
        environment.environment_card(),
        {"plain": card, "ppd": card},
        compare.shown_settings(args),
        cells,
    )
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content, allow_nan=False))
    return content, file


def test_results_file(tmp_path: Path) -> None:
    content, file = results(tmp_path)
    assert result_file.read_results(file) == json.loads(json.dumps(content))
    assert set(content) == {
        "format",
        "format_version",
        "script",
        "created",
        "environment",
        "engines",
        "settings",
        "cells",
    }
    # Results are published; folders of the machine that made them are not.
    assert str(tmp_path) not in json.dumps(content)
    assert str(BENCHMARKS.parent) not in json.dumps(content)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no results file"):
        result_file.read_results(tmp_path / "other.json")


def test_table_is_markdown() -> None:
    lines = compare.table([cell()[0]]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.20x (1.20-1.20)" in lines[-1]
    assert "| 4/4" in lines[-1]


def test_decoder_settings() -> None:
    base = {"model": "m"}
    assert harness.decoder_settings("plain", base, "p", {}, {}) == base
    ppd = harness.decoder_settings("ppd", base, "p", {"num_speculative_tokens": 7}, {})
    assert ppd["speculative_config"] == {
        "method": "ppd",
        "model": "p",
        "num_speculative_tokens": 7,
    }
    fixed = harness.decoder_settings("fixed", base, "p", {}, {})["speculative_config"]
    assert fixed == {"method": "ppd", "model": "p", "online": False}
    ngram = harness.decoder_settings("ngram", base, "p", {}, {"prompt_lookup_max": 2})
    assert ngram["speculative_config"]["prompt_lookup_max"] == 2
    with pytest.raises(ValueError, match="known: plain, ppd, ngram"):
        harness.decoder_settings("medusa", base, "p", {}, {})


@pytest.mark.parametrize(
    "argv",
    [
        ["--rounds", "2"],
        ["--starts", "0"],
        ["--batch", "0"],
        ["--waves", "0"],
        ["--decoders", "plain,x"],
    ],
)
def test_bad_arguments(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.parse_arguments(argv)
    assert stop.value.code == 2


def test_passages_are_the_same_every_time(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = ["".join(f"line {i} of text {t}\n" for i in range(200)) for t in range(5)]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, "short"]))
    found = harness.pick_texts(file, 4, 300)
    assert found == harness.pick_texts(file, 4, 300)
    assert len(set(found)) == 4
    assert all(len(p) == 300 and p.startswith("line ") for p in found)
    # More than there are texts: several from each, from other places.
    more = harness.pick_texts(file, 10, 300)
    assert len(set(more)) == 10 and all(p.startswith("line ") for p in more)
    with pytest.raises(ValueError, match="10 texts or parts of texts of 300"):
        harness.pick_texts(file, 11, 300)


def test_cpu_model() -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\n"
    assert environment.cpu_model(text) == "Some CPU @ 2 GHz"
    assert environment.cpu_model("processor : 0\n")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    _, file = results(tmp_path)
    out = tmp_path / f"plot{suffix}"
    assert plot.main([str(file), "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
