"""The benchmark of training speed: its arithmetic, and a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from benchmarks import train_speed, train_speed_curves
from tests.unit.tiny_base import write_texts, write_tiny_model


def point(seconds: float, tokens_per_step: float) -> dict[str, float]:
    return {"seconds": seconds, "tokens_per_step": tokens_per_step}


def test_times_sooner_is_between_first_times_of_equal_quality() -> None:
    one = [point(60, 1.2), point(120, 1.4), point(240, 1.4)]
    many = [point(3, 1.3), point(6, 1.38), point(12, 1.45), point(24, 1.41)]
    found = train_speed_curves.compared(one, many)
    assert found == [
        {
            "tokens_per_step": 1.2,
            "one_point_s": 60,
            "many_points_s": 3,
            "times_sooner": 20.0,
        },
        {
            "tokens_per_step": 1.4,
            "one_point_s": 120,
            "many_points_s": 12,
            "times_sooner": 10.0,
        },
    ]
    never = train_speed_curves.compared(one, many[:2])[-1]
    assert (never["many_points_s"], never["times_sooner"]) == (None, None)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed in round 2; the ratio does not notice.
    cell = train_speed.speed_cell(256, 8, {1: [100.0, 50.0], 64: [2100.0, 1050.0]})
    ratio = cell["points"]["64"]["ratio"]
    assert ratio == {"median": 21.0, "min": 21.0, "max": 21.0}
    assert cell["points"]["1"]["ratio"]["median"] == 1.0


def test_batches_of_all_lengths_have_as_much_text() -> None:
    args = train_speed.parse_arguments([])
    assert train_speed.batch_of(args, 256) * 256 == 2048
    assert train_speed.batch_of(args, 1024) * 1024 == 2048
    for bad in (["--speed-points", "4", "8"], ["--one-choices", "0.5"]):
        with pytest.raises(SystemExit):
            train_speed.parse_arguments(bad)


def test_a_quick_run(tmp_path: Path, capsys) -> None:
    write_tiny_model(tmp_path / "tiny")
    write_texts(tmp_path / "train.jsonl")
    write_texts(tmp_path / "held_out.jsonl", seed=1)
    out = tmp_path / "speed.json"
    argv = ["--quick", "--quiet", "--model", str(tmp_path / "tiny"), "--points", "4"]
    argv += ["--data", str(tmp_path / "train.jsonl"), "--lengths", "24", "48"]
    argv += ["--held-out", str(tmp_path / "held_out.jsonl"), "--batch-tokens", "48"]
    argv += ["--work", str(tmp_path / "work"), "--speed-lengths", "24", "48"]
    argv += ["--seeds", "2", "--one-choices", "0.5:1", "0.25:2"]
    assert train_speed.main([*argv, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert out.with_suffix(".png").stat().st_size > 1000
    assert [cell["batch_size"] for cell in results["cells"]] == [2, 1]
    assert set(results["cells"][0]["points"]) == {"1", "4"}
    assert [cell["length"] for cell in results["quality"]] == [24, 48]
    for cell in results["quality"]:
        curves = cell["curves"]
        assert len(curves["one"]) == len(curves["many"]) == 5
        for name, seeds in (("one", 1), ("many", 2)):
            for each in curves[name]:
                assert len(each["seeds"]) == seeds
                assert each["tokens_per_step"] == pytest.approx(
                    sum(each["seeds"]) / seeds, abs=1e-4
                )
        assert [p["batch_size"] for p in cell["one_point_choices"]] == [1, 2]
        # The longest one-point training has what was found best for it.
        best = max(cell["one_point_choices"], key=lambda p: p["tokens_per_step"])
        for name in ("learning_rate", "batch_size"):
            assert curves["one"][-1][name] == best[name]
    assert str(tmp_path) not in json.dumps(results)
