"""`vllm-ppd train` and `calibrate` where they cannot go on: models, disks, Ctrl-C.

Each ends with one sentence that names the thing, exit status 2 (130 for Ctrl-C), and
every file as it was before. What can be seen of an input alone is in test_bad_input.py.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.unit.refusals import contents
from tests.unit.tiny_base import SIZES
from vllm_ppd.calibrate import measure as calibrate_module
from vllm_ppd.cli import main
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.model import FrozenModel

TRAIN = "--steps 4 --length 24 --batch-size 2 --points 4 --checkpoint-every 2"
CALIBRATE = "--points 40 --prompt-length 8 --continue 12 --ranks 9"


class Workplace:
    """A model, a text, prompt tokens for the model, and the two commands."""

    def __init__(self, folder: Path, model: Path, data: Path, prompts: Path) -> None:
        self.folder, self.prompts, self.out = folder, prompts, folder / "out"
        self.model = shutil.copytree(model, folder / "model")
        self.data = shutil.copy(data, folder / "text.jsonl")

    def run(self, command: str, *more: str, **changed: Any) -> int:
        paths = {"model": self.model, "data": self.data, "out": self.out, **changed}
        own = ["train", "--out", str(paths["out"]), *TRAIN.split()]
        if command == "calibrate":
            own = ["calibrate", str(self.prompts), *CALIBRATE.split()]
        given = ["--model", str(paths["model"]), "--data", str(paths["data"])]
        return main.main([*own, *given, "--cpu", "--quiet", *more])


@pytest.fixture
def workplace(tmp_path, model_folder, data, prompts_folder) -> Workplace:
    return Workplace(tmp_path, model_folder, data, prompts_folder)


@pytest.fixture(params=["train", "calibrate"])
def command(request: pytest.FixtureRequest) -> str:
    return request.param


def refused(workplace, capsys, command: str, word: str, *more: str, **changed) -> None:
    original = contents(workplace.folder)
    capsys.readouterr()
    assert workplace.run(command, *more, **changed) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"vllm-ppd {command}: ")
    assert message.count("\n") == 1, message
    assert word in message
    assert contents(workplace.folder) == original


def test_models_that_are_no_causal_ones(workplace, capsys, command, tmp_path) -> None:
    config = transformers.BertConfig(vocab_size=257, initializer_range=0.3, **SIZES)
    encoder = workplace.folder / "encoder"
    shutil.copytree(workplace.model, encoder)
    (encoder / "model.safetensors").unlink()
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(encoder)
    config = {"architectures": ["T5Model"], "model_type": "t5", "hidden_size": 32}
    t5 = json.dumps({**config, "vocab_size": 257})
    for content in ((encoder / "config.json").read_text(), t5):
        (encoder / "config.json").write_text(content)
        base = BaseModelFingerprint.of_folder(encoder)
        table = PromptTokens.load(workplace.prompts).embeddings
        PromptTokens(table, base).save(workplace.prompts, overwrite=True)
        refused(workplace, capsys, command, "causal language model", model=encoder)


def test_output_that_is_there_already(workplace: Workplace, capsys) -> None:
    for command, word in {"train": "already has config", "calibrate": "exists"}.items():
        assert workplace.run(command) == 0
        refused(workplace, capsys, command, word)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_disk_that_is_full_from_the_start(workplace, capsys, command, full_disk):
    full_disk()
    refused(workplace, capsys, command, "No space left on device")


def test_a_disk_that_fills_up_while_training(workplace, capsys, monkeypatch, full_disk):
    """The checkpoint before is whole, and the run goes on from it."""
    assert workplace.run("train") == 0
    expected = PromptTokens.load(workplace.out).embeddings
    shutil.rmtree(workplace.out)
    sync = os.fsync

    def fills_up(handle: int) -> None:
        sync(handle)
        full_disk()

    # The first write is the checkpoint of step 2, the next the prompt tokens.
    monkeypatch.setattr(os, "fsync", fills_up)
    assert workplace.run("train") == 2
    monkeypatch.setattr(os, "fsync", sync)
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(workplace.out) == ["checkpoint.safetensors"]
    assert workplace.run("train", "--resume") == 0
    assert torch.equal(PromptTokens.load(workplace.out).embeddings, expected)


def test_a_checkpoint_of_another_run(workplace, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PromptTokens, "save", interrupt)
        assert workplace.run("train") == 130
    capsys.readouterr()
    assert os.listdir(workplace.out) == ["checkpoint.safetensors"]
    refused(workplace, capsys, "train", "continue it with --resume")
    word = "belongs to another run: it has settings.alpha 0.8 instead of 0.5"
    refused(workplace, capsys, "train", word, "--resume", "--alpha", "0.5")
    with workplace.data.open("a") as file:
        file.write('{"text": "one more"}\n')
    refused(workplace, capsys, "train", "data_sha256.train.text.jsonl", "--resume")
    (workplace.out / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    refused(workplace, capsys, "train", "is not a training checkpoint", "--resume")
    assert workplace.run("train", "--overwrite") == 0


@pytest.mark.parametrize(
    ("command", "owner", "name"),
    [
        ("train", FrozenModel, "load"),
        ("calibrate", FrozenModel, "load"),
        ("calibrate", calibrate_module, "continue_prompts"),
    ],
)
def test_ctrl_c(workplace, capsys, monkeypatch, command, owner, name) -> None:
    monkeypatch.setattr(owner, name, interrupt)
    original = contents(workplace.folder)
    assert workplace.run(command) == 130
    assert capsys.readouterr().err.strip() == ""
    assert contents(workplace.folder) == original
    assert not workplace.out.exists()
