"""The ablations of trees and training, without engines and trainings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import numpy as np
import pytest
import train_ablation
import tree_ablation

from tests.unit.models import DEMO, published_model
from vllm_ppd.cli.main import _parser
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import policy_value


def test_the_papers_trees_are_worth_what_is_published_model() -> None:
    trees = tree_ablation.paper_trees(published_model(), 64, 1)
    assert max(tree.num_rows for tree in trees) <= 64
    length = policy_value([trees], published_model(), LatencyCurve.constant())[0]
    assert length == pytest.approx(2.245, abs=0.002)
    # One prompt token stays on every node that there is room for.
    assert all(min(tree.prompts) >= 1 for tree in trees)


@pytest.mark.parametrize("rows", [8, 12])
def test_ours_is_the_best_of_the_kinds(rows: int) -> None:
    for model in (published_model(), AcceptanceModel.load(DEMO / "acceptance.json")):
        lengths = {}
        for kind in tree_ablation.KINDS:
            entry = tree_ablation.entry_of(kind, model, rows)
            assert entry.max_rows <= rows and len(entry.policies) == model.num_classes
            lengths[kind] = entry.acceptance_length
        assert lengths["ours"] == max(lengths.values())
        entry = tree_ablation.entry_of("chain", model, rows)
        for tree in (tree for policy in entry.policies for tree in policy.trees):
            assert tree.parents == tuple(range(tree.depth)) and set(tree.ranks) <= {0}


def test_acceptance_is_counted_from_the_output() -> None:
    sizes = [1, 3, 3, 3, 3, 3, 3, 1]
    steps = tuple((0.1 * i, (7,) * n) for i, n in enumerate(sizes))
    requests = [engines.generation(steps)] * 5
    # Steps that the end of the request may have cut short do not count.
    assert tree_ablation.acceptance_length(requests, 20, 4) == (3.0, 0.0)
    mixed = [engines.generation(steps[:1] + steps[-1:] * 9), *requests]
    length, half_width = tree_ablation.acceptance_length(mixed, 20, 4)
    assert 1 < length < 3 and 0 < half_width < 1
    with pytest.raises(ValueError, match="--max-tokens"):
        tree_ablation.acceptance_length(requests, 4, 4)


def test_predictions_alone_start_no_engine(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "r.json"
    argv = ["--predict-only", "--rows", "8", "--out", str(out)]
    assert tree_ablation.main([*argv, "--prompts", str(DEMO)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 3 * (4 + 3) and all(cell["predicted"] > 1 for cell in cells)
    table = capsys.readouterr().out.replace(" ", "")
    assert "|vicuna-7b-v1.3|promptrows|ours|8|1.700|" in table


def test_trainings_run_once_and_in_order(tmp_path: Path, monkeypatch, capsys) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], **options: Any) -> Any:
        commands.append(command)
        # Its flags are those that the command has.
        _parser(command[3]).parse_args(command[3:])
        if command[3] == "train":
            out = Path(command[command.index("--out") + 1])
            shutil.copytree(DEMO, out)
            (out / "acceptance.json").unlink()
        else:
            shutil.copy(DEMO / "acceptance.json", command[4])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(train_ablation, "subprocess", SimpleNamespace(run=fake))
    monkeypatch.setattr(train_ablation, "ROWS", (8,))
    argv = ["--work", str(tmp_path), "--data", str(DEMO)]
    assert train_ablation.main(argv) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    runs = [cell["run"] for cell in document["cells"]]
    assert len(runs) == len(set(runs)) and len(commands) == 2 * len(runs)
    assert runs.index("time=1_4") < runs.index("init=quarter")
    assert np.all([len(cell["top1"]) == 3 for cell in document["cells"]])
    assert train_ablation.main(argv) == 0
    assert len(commands) == 2 * len(runs)
