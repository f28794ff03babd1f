"""The tree ablation without engines, and the timing of searches."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from benchmarks.tree_ablation import command, page, prediction
from benchmarks.tree_ablation.document import read_document
from benchmarks.tree_ablation.kinds import (
    KINDS,
    Variant,
    plan_of,
    trees_of,
    value_of,
)
from benchmarks.tree_ablation.measurement import Work, engine_settings, measure_plan
from benchmarks.tree_ablation.prediction import predict_published, published
from benchmarks.tree_ablation.records import RecordFolder, plan_name
from tests.unit.test_tree_command import EVIDENCE
from vllm_ppd.cli.generation import Batch, Generation, Step
from vllm_ppd.config import PPDConfig
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.baseline_policies import baseline_trees
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.bigram import BIGRAM_FILE
from vllm_ppd.trees.menu import TreePlan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
search_time: Any = importlib.import_module("search_time")

BARE = AcceptanceModel.of(AcceptanceStats(EVIDENCE.prompted))


@pytest.mark.parametrize("acceptance", [BARE, EVIDENCE], ids=["rows", "all"])
@pytest.mark.parametrize("rows", [8, 12])
def test_ours_is_the_best_of_the_kinds(acceptance: AcceptanceModel, rows: int) -> None:
    values = {}
    for kind in KINDS:
        trees = trees_of(kind, acceptance, rows)
        assert len(trees) == acceptance.num_classes
        assert max(tree.num_rows for row in trees for tree in row) <= rows
        values[kind] = value_of(trees, acceptance)
        assert 1 <= values[kind].mean_rows <= rows + 1e-9
        plan_of(trees)
    assert values["ours"].tau >= max(v.tau for v in values.values()) - 1e-9
    assert values["random"].tau < values["paper"].tau


@pytest.mark.parametrize("kind", ["paper", "full", "random"])
def test_without_matches_kinds_are_the_published_ones(kind: str) -> None:
    stats = AcceptanceStats(EVIDENCE.prompted)
    known = baseline_trees(kind, stats, 12, 1, 3)  # type: ignore[arg-type]
    assert trees_of(kind, BARE, 12, 1, 3) == (known,)  # type: ignore[arg-type]


def test_chains_are_chains() -> None:
    trees = trees_of("chain", EVIDENCE, 12)
    for row in trees:
        for tree in row:
            assert tree.parents == tuple(range(len(tree.parents)))
            assert set(tree.ranks) <= {0}
    # Earlier text is followed further than prompt rows reach.
    assert max(len(tree.parents) for tree in trees[2]) > EVIDENCE.num_prompt_tokens
    stats = AcceptanceStats(EVIDENCE.prompted)
    plain = value_of((baseline_trees("chain", stats, 12),), BARE)
    assert value_of(trees_of("chain", BARE, 12), BARE).tau == pytest.approx(
        plain.tau, rel=1e-3
    )


def test_published_tables_are_predicted_without_table_and_matches() -> None:
    sources = ((False, False), (True, True))
    variants = list(Variant.all(("paper", "ours"), (8, 64), sources))
    cells = predict_published(variants, lambda text: None)
    assert {cell["statistics"] for cell in cells} == set(published())
    assert len(cells) == 4 * len(published())
    taus = {(c["statistics"], c["kind"], c["rows"]): c["tau"] for c in cells}
    # What the paper's trees are known to reach with every row counted.
    assert taus["vicuna-7b-v1.3", "paper", 64] == pytest.approx(2.245, abs=0.002)
    assert taus["vicuna-7b-v1.3", "ours", 64] >= taus["vicuna-7b-v1.3", "paper", 64]


class Written:
    """An engine that writes a fixed number of tokens per step."""

    def __init__(self, each: int):
        self.each = each
        self.asked: list[tuple[int, dict[str, Any]]] = []
        self.held: list[TreePlan] = []

    def hold(self, plan: TreePlan) -> None:
        self.held.append(plan)

    def generate(self, prompts: Any, params: dict[str, Any]) -> Batch:
        self.asked.append((len(prompts), params))
        # The first step reads the prompt; the end cuts the last.
        sizes = [1]
        while sum(sizes) < params["max_tokens"]:
            sizes.append(min(self.each, params["max_tokens"] - sum(sizes)))
        steps = tuple(Step(0.01 * i, (7,) * n, "", "x") for i, n in enumerate(sizes))
        return Batch(1.0, len(sizes), (Generation(steps),) * len(prompts))


def work(**changes: Any) -> Work:
    values: dict[str, Any] = {
        "model": "M",
        "prompt_tokens": "P",
        "prompts": [[1, 2, 3]] * 5,
        "max_tokens": 20,
        "temperatures": [0.0, 1.0],
        "batch": 2,
    }
    return Work(**{**values, **changes})


def test_acceptance_is_counted_from_what_was_written() -> None:
    plan = plan_of(trees_of("ours", EVIDENCE, 8))
    engine = Written(3)
    found = measure_plan(engine, work(), plan)["temperatures"]
    assert set(found) == {"0", "1"} and engine.held == [plan]
    # 20 = 1 + 6 * 3 + 1, and steps near the end are left out.
    assert found["0"]["tokens_per_step"] == 3.0
    assert 0 < found["0"]["steps"] < 5 * 7
    assert [count for count, _ in engine.asked] == [2, 2, 1] * 2
    assert [p["temperature"] for _, p in engine.asked] == [0.0] * 3 + [1.0] * 3
    assert all(p["ignore_eos"] and p["max_tokens"] == 20 for _, p in engine.asked)


def test_engines_get_the_trees_and_nothing_that_changes_them(tmp_path: Path) -> None:
    settings = engine_settings(work(), tmp_path / "plan.json", True, False)
    config = PPDConfig.from_speculative(settings["speculative_config"])
    assert (config.path, config.tree) == ("P", str(tmp_path / "plan.json"))
    assert (config.bigram, config.ngram) == (True, False)
    assert (config.profile, config.online) == ("none", False)
    assert settings["max_model_len"] > 3 + 20


def test_equal_plans_have_one_name_and_one_record(tmp_path: Path) -> None:
    plan = plan_of(trees_of("ours", EVIDENCE, 8))
    again = TreePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert plan_name(plan, True) == plan_name(again, True)
    assert plan_name(plan, True) != plan_name(plan, False)
    other = plan_of(trees_of("chain", EVIDENCE, 8))
    assert plan_name(other, True) != plan_name(plan, True)
    records = RecordFolder(tmp_path / "work", {"temperatures": [0.0], "model": "a"})
    records.open()
    records.open()
    assert records.read("x") is None
    records.write("x", {"temperatures": {}})
    assert records.read("x") == {"temperatures": {}}
    with pytest.raises(ValueError, match="model 'a' instead of 'b'"):
        RecordFolder(tmp_path / "work", {"temperatures": [0.0], "model": "b"}).open()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = BaseModelFingerprint("org/base", None, "LlamaForCausalLM", 4, 30, None)
    path = tmp_path / "prompts"
    PromptTokens(torch.zeros(2, 1, 4), base).save(path)
    EVIDENCE.save(path / ACCEPTANCE_FILE)
    (path / BIGRAM_FILE).touch()
    return path


@pytest.fixture
def ablate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command with a made-up engine; returns the status and the engines."""
    engines: list[Written] = []

    class Running:
        def __init__(self, work: Any, widest: TreePlan, *source: bool):
            assert widest.num_classes == (3 if source[1] else 1)
            self.widest = widest

        def __enter__(self) -> Written:
            engines.append(Written(2))
            if len(engines) == stop_at[0]:
                raise KeyboardInterrupt
            return engines[-1]

        def __exit__(self, *error: object) -> None:
            # An engine has no room for more rows than it was started for.
            rows = [plan.max_rows for plan in engines[-1].held]
            assert max(rows, default=0) <= self.widest.max_rows

    stop_at = [0]
    # Sizes for a machine are searched up to these; less is sooner found.
    monkeypatch.setattr(prediction, "DEFAULT_ROWS", {"cpu": 6, "cuda": 8})
    monkeypatch.setattr(command, "running", Running)
    monkeypatch.setattr(command, "prompt_ids", lambda args: [[1, 2]] * 4)

    def run(*more: str, stop: int = 0, quick: bool = True) -> tuple[int, list[Written]]:
        engines.clear()
        stop_at[0] = stop
        argv = ["--quick"] * quick + ["--quiet", "--prompts", str(folder)]
        argv += ["--work", str(tmp_path / "work"), *more]
        return command.main(argv), list(engines)

    return run


def test_a_stopped_command_goes_on(ablate, tmp_path: Path) -> None:
    out = tmp_path / "work" / "results.json"
    status, engines = ablate(stop=3)
    assert (status, len(engines)) == (130, 3)
    assert not out.exists()
    status, engines = ablate()
    # Two of the four sources were done.
    assert (status, len(engines)) == (0, 2)
    status, engines = ablate()
    assert (status, len(engines)) == (0, 0)
    results = read_document(out)
    assert len(results["measured"]) == 4
    for cell in results["measured"]:
        assert cell["temperatures"]["0"]["tokens_per_step"] == 2.0
        assert cell["predicted_tau"] > 1
    assert out.with_suffix(".png").stat().st_size > 1000


def test_an_engine_serves_every_plan_of_its_source(ablate, tmp_path: Path) -> None:
    argv = ["--rows", "4,8", "--kinds", "ours,chain", "--out", str(tmp_path / "r.json")]
    status, engines = ablate(*argv, quick=False)
    assert (status, len(engines)) == (0, 4)
    for engine in engines:
        assert 2 <= len(engine.held) <= 4
        assert len({plan_name(plan, True) for plan in engine.held}) == len(engine.held)
        assert {plan.max_rows for plan in engine.held} > {4}
    assert len(read_document(tmp_path / "r.json")["measured"]) == 16


def test_results_and_page(ablate, tmp_path: Path) -> None:
    profile = tmp_path / "slow.json"
    LatencyProfile((1,), (1, 4, 16), ((1.0, 9.0, 99.0),), {}).save(profile)
    assert ablate("--profile", str(profile))[0] == 0
    results = read_document(tmp_path / "work" / "results.json")
    machines = {cell["machine"] for cell in results["chosen"]}
    assert machines == {"typical cpu", "typical cuda", "slow"}
    # There four rows cost nine plain steps.
    assert {c["gain"] for c in results["chosen"] if c["machine"] == "slow"} == {1.0}
    assert str(tmp_path) not in json.dumps(results)
    text = f"# Title\n\n{page.PAGE.begin}\nold\n<!-- end -->\n\nreading\n"
    new = page.PAGE.text_with(text, results)
    assert "old" not in new and new.endswith("reading\n")
    assert page.PAGE.text_with(new, results) == new
    for part in (
        "### Measured on the demo model",
        "| prompt rows + bigram table + earlier matches | ours | 8 |",
        "### Predicted tokens per step: vicuna-7b-v1.3",
        "| slow | 1 | plain | plain | plain | plain |",
    ):
        assert part in new
    with pytest.raises(ValueError, match="has no line"):
        page.PAGE.text_with("# Title", results)


def test_predictions_alone_start_no_engine(ablate, tmp_path: Path) -> None:
    status, engines = ablate("--predict-only")
    assert (status, engines) == (0, [])
    results = read_document(tmp_path / "work" / "results.json")
    assert results["measured"] == [] and results["predicted"]
    assert "### Measured" not in "\n".join(page.lines(results))


def test_bad_arguments(ablate, folder: Path, tmp_path: Path, capsys) -> None:
    for argv, message in (
        (["--kinds", "best"], "--kinds has 'best'; choose from chain"),
        (["--rows", "1"], "expected numbers from 2 to 128"),
        (["--num-prompts", "0"], "--num-prompts is 0"),
    ):
        with pytest.raises(SystemExit):
            command.parse_arguments(argv)
        assert message in capsys.readouterr().err
    (folder / ACCEPTANCE_FILE).unlink()
    assert ablate()[0] == 2
    assert "measure it with vllm-ppd calibrate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_document(tmp_path / "nothing.json")


def test_the_committed_page_shows_the_committed_results() -> None:
    assert page.PAGE.command("", ["--check"]) == 0


def test_results_never_replace_the_committed_ones_by_a_trial() -> None:
    for argv in (["--quick"], ["--predict-only"]):
        assert command.parse_arguments(argv).out != command.RESULTS
    assert command.parse_arguments([]).out == command.RESULTS


def test_search_times(capsys, tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    assert search_time.main(["--dry-run", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [cell["search"] for cell in results["cells"]] == list(search_time.SEARCHES)
    assert all(cell["cpu_s"] > 0 and cell["runs"] == 1 for cell in results["cells"])
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) == results
    assert "| best_plan | 1 | 1 |" in shown
    # What is timed has all sources at work.
    acceptance = search_time.evidence_of(4)
    assert acceptance.num_classes == 3 and acceptance.unprompted.any()
    assert np.array_equal(acceptance.overall[-1], acceptance.unprompted)
    names = [name for name, _ in search_time.searches(512, 3, 1)]
    assert names == ["optimal_policy", "best_policy"]


def test_repeated_runs_fill_the_time() -> None:
    calls = []
    found = search_time.timed(lambda: calls.append(1), 0.01)
    assert found["runs"] == len(calls) >= 3
    assert found["fastest_s"] <= found["wall_s"]
