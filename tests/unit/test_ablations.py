"""The ablations on a tiny model, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from benchmarks.ablations import command, page, plan
from benchmarks.ablations.document import read_document
from benchmarks.ablations.progress import Progress
from benchmarks.ablations.walk import mean_acceptance_length, walk_text
from benchmarks.ablations.workbench import Workbench
from tests.unit.tiny_base import write_texts, write_tiny_model
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_search import optimal_policy
from vllm_ppd.train.trainer import Interrupted
from vllm_ppd.trees.tree import SparseTree

TABLES = "loss,init"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, training text and held-out text."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder / "tiny")
    write_texts(folder / "train.jsonl")
    write_texts(folder / "held_out.jsonl", seed=1)
    return folder


@pytest.fixture(scope="module")
def ablate(base: Path) -> Callable[..., int]:
    def run(*more: str) -> int:
        argv = ["--quick", "--quiet", "--model", str(base / "tiny")]
        argv += ["--data", str(base / "train.jsonl"), "--length", "24"]
        argv += ["--held-out", str(base / "held_out.jsonl")]
        argv += ["--work", str(base / "work"), "--seconds-per-run", "0.1"]
        return command.main([*argv, "--tables", TABLES, *more])

    return run


@pytest.fixture(scope="module")
def results(base: Path, ablate: Callable[..., int]) -> dict:
    assert ablate() == 0
    assert (base / "work" / "results.png").stat().st_size > 1000
    return read_document(base / "work" / "results.json")


def test_every_run_can_be_trained_and_follows_what_it_starts_from() -> None:
    runs = plan.runs_of(plan.TABLES)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for place, run in enumerate(runs):
        run.train_settings(60.0, 256, 0.1)
        if run.init_from is not None:
            assert run.init_from in names[:place]
    for table in plan.TABLES:
        assert plan.BASELINE in [run for _, run in table.rows], table.key
    # The issue of each table, by the settings that its runs differ in.
    by_key = {table.key: table for table in plan.TABLES}
    settings = {
        key: [run.train_settings(60.0, 256, 0.1) for _, run in by_key[key].rows]
        for key in ("prompt_tokens", "ept", "points")
    }
    assert [s.num_prompt_tokens for s in settings["prompt_tokens"]] == [*range(1, 7)]
    assert [s.num_ept for s in settings["ept"]] == [1, 2, 4, 8]
    assert {1, 4, 16, 64} <= {s.points for s in settings["points"]}
    with pytest.raises(ValueError, match="no table 'epts'; choose from time, text"):
        plan.chosen_tables(["epts"])
    # A table alone still brings the runs that its own start from.
    alone = [run.name for run in plan.runs_of(plan.chosen_tables(["init"]))]
    assert alone.index("time=1_4") < alone.index("init=shorter")


def test_a_walk_over_a_text() -> None:
    # State 1: candidates of rank 0 and 1; the one of rank 1 has no prompt token.
    trees = (SparseTree((), (), (1,)), SparseTree((0, 0), (0, 1), (1, 1, 0)))
    hit, second, miss = 0, 1, 9
    # Root 0 (state 0) ends at 0; ranks[0] guesses token 2, under root 1.
    ranks = np.array([[hit], [miss], [second], [miss], [miss], [hit], [hit], [hit]])
    # 0: end 0. root 1, ranks[0] hit: end 2. root 3, ranks[2] second: end 4, which has
    # no prompt token. root 5, state 0: end 5. root 6, ranks[5] hit: end 7. root 8.
    assert walk_text(trees, ranks) == (1 + 2 + 2 + 1 + 2, 5)
    with pytest.raises(ValueError, match="single decode step"):
        mean_acceptance_length(trees, [ranks[:1]])


def test_walks_agree_with_the_model_where_distances_are_independent() -> None:
    random = np.random.default_rng(0)
    rates = np.array([[0.5, 0.2, 0.1], [0.3, 0.2, 0.1], [0.2, 0.2, 0.1]])
    found = optimal_policy(AcceptanceStats(rates), LatencyCurve.constant(), 12)
    padded = np.concatenate([rates, 1 - rates.sum(axis=1, keepdims=True)], axis=1)
    ranks = np.stack([random.choice(4, 20_000, p=row) for row in padded], axis=1)
    walked = mean_acceptance_length(found.trees, [ranks])
    assert walked == pytest.approx(found.tau, rel=0.015)
    assert found.tau > 1.5


def test_results_have_every_figure(results: dict) -> None:
    runs = results["runs"]
    assert {"baseline", "loss=labels", "init=m_1", "num_prompt_tokens=1"} <= set(runs)
    (record,) = runs["init=m_1"]
    assert record["settings"]["init"] == "num_prompt_tokens=1"
    assert record["settings"]["num_prompt_tokens"] == 3
    assert len(record["acceptance"]["top1"]) == 3
    assert len(runs["num_prompt_tokens=1"][0]["acceptance"]["top1"]) == 1
    assert set(record["rows"]) == {"4", "16"}
    assert record["cost"]["parameters"] == 3 * 32
    assert record["cost"]["bytes"] > 4 * 3 * 32
    assert record["cost"]["tokens"] == record["cost"]["steps"] * 8 * 24
    # m = 1 takes 4 rows, so two more rows change nothing about what is counted.
    for seeds in runs.values():
        for figures in seeds[0]["rows"].values():
            assert figures["tau"] >= 1
    assert results["settings"]["model"] == "tiny"
    assert "/" not in json.dumps(results["settings"]["data_sha256"])


def test_finished_runs_are_kept(
    base: Path, ablate, results: dict, monkeypatch, capsys
) -> None:
    def train(*args, **kwargs):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Workbench, "train", train)
    out = base / "again.json"
    assert ablate("--out", str(out)) == 0
    assert read_document(out)["runs"] == results["runs"]
    # Another time per run would not compare with what is there.
    assert ablate("--seconds-per-run", "0.2") == 2
    assert "seconds_per_run 0.1 instead of 0.2" in capsys.readouterr().err


def test_a_stopped_command_goes_on(base: Path, ablate, monkeypatch, capsys) -> None:
    argv = ["--work", str(base / "stopped"), "--tables", "loss"]
    train = Workbench.train

    def stop(self, settings, *args, **kwargs):
        if settings.loss == "labels":
            raise Interrupted("asked to stop")
        return train(self, settings, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "train", stop)
        assert ablate(*argv) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not (base / "stopped" / "results.json").exists()
    baseline = base / "stopped" / "baseline,seed=0.json"
    before = baseline.read_bytes()
    assert ablate(*argv) == 0
    assert baseline.read_bytes() == before
    assert set(read_document(base / "stopped" / "results.json")["runs"]) == {
        "baseline",
        "loss=labels",
    }


def test_page(results: dict, tmp_path: Path) -> None:
    text = f"# Title\n\n{page.PAGE.begin}\nold\n<!-- end -->\n\nreading\n"
    new = page.PAGE.text_with(text, results)
    assert "old" not in new and new.endswith("reading\n")
    assert page.PAGE.text_with(new, results) == new
    for table in results["tables"]:
        assert f"### {table['title']}" in new
        for row in table["rows"]:
            assert f"| {row['label']} |" in new
    widths = {line.count("|") for line in new.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    with pytest.raises(ValueError, match="has no line"):
        page.PAGE.text_with("# Title", results)


def test_the_committed_page_shows_the_committed_results() -> None:
    assert page.PAGE.command("", ["--check"]) == 0


def test_progress_counts_what_is_left() -> None:
    progress = Progress([10.0, 20.0], quiet=True)
    # Examining a run is guessed at 8 s until one was examined, here in no time.
    assert progress.seconds_left() == 10 + 20 + 2 * 8
    with progress.run("first"):
        assert 20 + 8 <= progress.seconds_left() <= 10 + 20 + 2 * 8
    assert progress.seconds_left() == 20
    progress.close()


def test_other_files_are_no_results(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"format": "ppd_benchmark", "format_version": 1}')
    with pytest.raises(ValueError, match="no results file of ablations"):
        read_document(file)


@pytest.mark.parametrize(
    "argv",
    [["--seconds-per-run", "0"], ["--seeds", "0"], ["--threads", "-1"]],
)
def test_bad_arguments(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        command.parse_arguments(["--data", "x", "--work", str(tmp_path), *argv])
    assert stop.value.code == 2
