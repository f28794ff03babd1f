"""`vllm-ppd train` and `calibrate` where they cannot go on: models, disks, Ctrl-C.

Each ends with one sentence that names the thing, exit status 2 (130 for Ctrl-C), and
every file as it was before. What can be seen of an input alone is in test_bad_input.py.
"""

from __future__ import annotations

import json
import os
import shutil
from unittest.mock import Mock

import pytest
import torch
import transformers

from tests.unit.refusals import contents, refused
from tests.unit.test_bad_input import COMMANDS, Place, place, run_command
from tests.unit.tiny_base import SIZES
from vllm_ppd.calibrate import measure as calibrate_module
from vllm_ppd.cli import main
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.model import FrozenModel

__all__ = ["place"]
interrupt = Mock(side_effect=KeyboardInterrupt)


def argv(place: Place, command: str, *more: str) -> list[str]:
    """A small command on the files of a place."""
    if command == "train":
        command, more = "train --steps 4", ("--checkpoint-every", "2", *more)
    return [*COMMANDS[command].format_map(place).split(), *more]


def run(place: Place, command: str, *more: str) -> int:
    return main.main(argv(place, command, *more))


def fails(place: Place, command: str, word: str, *more: str) -> None:
    original = contents(place.folder)
    with refused(ValueError, f"vllm-ppd {command}: ", word):
        run_command(argv(place, command, *more))
    assert contents(place.folder) == original


@pytest.fixture(params=["train", "calibrate"])
def command(request: pytest.FixtureRequest) -> str:
    return request.param


def test_models_that_are_no_causal_ones(place, command) -> None:
    config = transformers.BertConfig(vocab_size=257, initializer_range=0.3, **SIZES)
    encoder = shutil.copytree(place["model"], place.folder / "encoder")
    (encoder / "model.safetensors").unlink()
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(encoder)
    config = {"architectures": ["T5Model"], "model_type": "t5", "hidden_size": 32}
    t5 = json.dumps({**config, "vocab_size": 257})
    for content in ((encoder / "config.json").read_text(), t5):
        (encoder / "config.json").write_text(content)
        base = BaseModelFingerprint.of_folder(encoder)
        table = PromptTokens.load(place["prompts"]).embeddings
        PromptTokens(table, base).save(place["prompts"], overwrite=True)
        fails(place, command, "causal language model", "--model", str(encoder))


def test_output_that_is_there_already(place) -> None:
    for command, word in {"train": "already has config", "calibrate": "exists"}.items():
        assert run(place, command) == 0
        fails(place, command, word)


def test_a_disk_that_is_full_from_the_start(place, command, full_disk) -> None:
    full_disk()
    fails(place, command, "No space left on device")


def test_a_disk_that_fills_up_while_training(place, monkeypatch, full_disk) -> None:
    """The checkpoint before is whole, and the run goes on from it."""
    assert run(place, "train") == 0
    expected = PromptTokens.load(place["out"]).embeddings
    shutil.rmtree(place["out"])
    sync = os.fsync

    def fills_up(handle: int) -> None:
        sync(handle)
        full_disk()

    # The first write is the checkpoint of step 2, the next the prompt tokens.
    monkeypatch.setattr(os, "fsync", fills_up)
    with refused(ValueError, "No space left"):
        run_command(argv(place, "train"))
    monkeypatch.setattr(os, "fsync", sync)
    assert os.listdir(place["out"]) == ["checkpoint.safetensors"]
    assert run(place, "train", "--resume") == 0
    assert torch.equal(PromptTokens.load(place["out"]).embeddings, expected)


def test_a_checkpoint_of_another_run(place, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PromptTokens, "save", interrupt)
        assert run(place, "train") == 130
    assert os.listdir(place["out"]) == ["checkpoint.safetensors"]
    fails(place, "train", "continue it with --resume")
    word = "belongs to another run: it has settings.alpha 0.8 instead of 0.5"
    fails(place, "train", word, "--resume", "--alpha", "0.5")
    with place["data"].open("a") as file:
        file.write('{"text": "one more"}\n')
    fails(place, "train", "data_sha256.train.text.jsonl", "--resume")
    (place["out"] / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    fails(place, "train", "is not a training checkpoint", "--resume")
    assert run(place, "train", "--overwrite") == 0


@pytest.mark.parametrize(
    ("command", "owner", "name"),
    [
        ("train", FrozenModel, "load"),
        ("calibrate", FrozenModel, "load"),
        ("calibrate", calibrate_module, "continue_prompts"),
    ],
)
def test_ctrl_c(place, capsys, monkeypatch, command, owner, name) -> None:
    monkeypatch.setattr(owner, name, interrupt)
    original = contents(place.folder)
    assert run(place, command) == 130
    assert capsys.readouterr().err.strip() == ""
    assert contents(place.folder) == original
    assert not place["out"].exists()
