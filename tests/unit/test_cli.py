"""The command vllm-ppd: help, errors, and `inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from tests.unit.tiny_base import write_weights
from vllm_ppd.cli import main
from vllm_ppd.cli.engines import EngineFailedError
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
from vllm_ppd.search.menu_search import build_menu
from vllm_ppd.trees.menu import MENU_FILE, save_menus

HIDDEN, VOCAB = 8, 50


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    return write_weights(tmp_path / "model", weight)


@pytest.fixture
def prompts(tmp_path: Path, model: Path) -> Path:
    base = BaseModelFingerprint.of_folder(model, name="org/base")
    folder = tmp_path / "prompts"
    embeddings = torch.zeros(3, 2, HIDDEN)
    embeddings[1, 0, :2] = torch.tensor([3.0, 4.0])
    PromptTokens(embeddings, base).save(folder)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `vllm-ppd probe` raise this."""
    run = Mock(side_effect=error)
    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "vllm_ppd.cli.probe", module)
    monkeypatch.setitem(main.COMMANDS, "probe", ("probes", "vllm-ppd probe"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from vllm_ppd.cli.main import COMMANDS, main\n"
        "for command in ('', *COMMANDS):\n"
        "    heavy = {'vllm', 'torch', 'transformers', '' if command else 'numpy'}\n"
        "    with contextlib.suppress(SystemExit): main([*command.split(), '--help'])\n"
        "    assert not heavy & set(sys.modules), command\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    said = " ".join(done.stdout.split())
    for _, example in main.COMMANDS.values():
        assert f"example: {example}" in said


def test_no_command_prints_help(capsys: pytest.CaptureFixture) -> None:
    assert main.main([]) == 2
    assert "inspect" in capsys.readouterr().out


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_ppd", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("vllm-ppd ")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no x"), 2), (EngineFailedError("dead"), 1), (OSError("no y"), 1)],
)
def test_errors_are_sentences(monkeypatch, capsys, error, status) -> None:
    command(monkeypatch, error)
    assert main.main(["probe"]) == status
    assert capsys.readouterr().err == f"vllm-ppd probe: {error}\n"
    for argv in (["probe", "--debug"], ["--debug", "probe"]):
        assert main.main(argv) == status
        assert "Traceback" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    command(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        main.main(["probe"])


def inspect_json(capsys, *argv: str) -> tuple[int, dict]:
    status = main.main(["inspect", "--json", *argv])
    return status, json.loads(capsys.readouterr().out)


def test_inspect_json(prompts: Path, model: Path, capsys) -> None:
    status, described = inspect_json(capsys, str(prompts), "--model", str(model))
    assert status == 0
    assert (described["num_prompt_tokens"], described["num_ept"]) == (3, 2)
    assert described["hidden_size"] == HIDDEN
    assert described["trainable_parameters"] == 3 * 2 * HIDDEN
    assert described["base_model"]["name"] == "org/base"
    assert described["training"] is None
    assert described["acceptance"] is None
    assert described["problems"] == []
    fits = {"model": str(model), "fits": True, "drift": 0.0}
    assert described["fits"] == fits


def test_inspect_reads_the_records(prompts: Path, capsys) -> None:
    scores = {"model_top1": [0.3, 0.2, 0.1], "model_top10": [0.6, 0.5, 0.4]}
    record = {"steps": 7, "seconds": 12.5, "device": "cpu", "history": [1, 2, 3]}
    record |= {"settings": {"alpha": 0.8}, "held_out": scores}
    (prompts / "training.json").write_text(json.dumps(record))
    model = AcceptanceModel.of([[0.25, 0.125], [0.125, 0.125], [0.0625, 0.0]])
    model.save(prompts / ACCEPTANCE_FILE)
    menu = build_menu(model, 8, 2)
    save_menus(prompts / MENU_FILE, menu, menu)
    status, described = inspect_json(capsys, str(prompts))
    assert status == 0
    assert described["training"]["steps"] == 7
    assert "history" not in described["training"]
    assert described["draft_lengths"] == list(menu.draft_lengths)
    assert described["acceptance"]["top1"] == [0.25, 0.125, 0.0625]
    assert described["acceptance"]["top10"] == [0.375, 0.25, 0.0625]
    assert main.main(["inspect", str(prompts)]) == 0
    shown = capsys.readouterr().out
    for word in ("org/base", "7 steps", "0.300 / 0.600", "0.062 / 0.062", "alpha 0.8"):
        assert word in shown


def test_inspect_says_what_does_not_fit(prompts: Path, model: Path, capsys) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    status, described = inspect_json(capsys, str(prompts), "--model", str(model))
    assert status == 1
    assert described["fits"]["fits"] is False
    assert "hidden size 16 instead of 8" in described["problems"][0]
    assert main.main(["inspect", str(prompts), "--model", str(model)]) == 1
    assert "problem: these prompt tokens" in capsys.readouterr().out


def test_inspect_leaves_out_what_is_no_number(prompts: Path, capsys) -> None:
    scores = {"model_top1": ["a"], "model_top10": [[]]}
    record = {"steps": 10**400, "seconds": [3], "held_out": scores, "settings": 3}
    (prompts / "training.json").write_text(json.dumps(record))
    assert main.main(["inspect", str(prompts)]) == 0
    assert "recorded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["training.json", ACCEPTANCE_FILE, MENU_FILE])
def test_inspect_reports_unreadable_records(prompts: Path, name: str, capsys) -> None:
    (prompts / name).write_text("{")
    status, described = inspect_json(capsys, str(prompts))
    assert status == 1
    assert name in described["problems"][0]
