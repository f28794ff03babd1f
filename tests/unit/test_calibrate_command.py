"""`vllm-ppd calibrate` writes a table with its record and plot, or leaves no trace."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from vllm_ppd.search.acceptance_table import AcceptanceError, AcceptanceStats  # noqa: E402

from tests.unit.test_calibrate import table, tiny_llama  # noqa: E402
from vllm_ppd.calibrate import job as calibration_job  # noqa: E402
from vllm_ppd.cli import calibrate as command  # noqa: E402
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint  # noqa: E402
from vllm_ppd.prompt_tokens.tokens import PromptTokens, PromptTokensError  # noqa: E402
from vllm_ppd.search.acceptance import AcceptanceModel  # noqa: E402
from vllm_ppd.train.settings import TrainingError  # noqa: E402
from vllm_ppd.trees.bigram import BigramTable  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and a text file."""
    folder = tmp_path_factory.mktemp("calibrate")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    ).save_pretrained(folder / "tiny")
    tiny_llama(len(vocabulary)).save_pretrained(folder / "tiny")
    words = random.Random(0).choices(["alpha", "beta", "(x)", "= 1"], k=120)
    (folder / "text.txt").write_text(" ".join(words))
    return folder / "tiny", folder / "text.txt"


@pytest.fixture
def prompts_folder(folders, tmp_path: Path) -> Path:
    path = tmp_path / "prompts"
    base = BaseModelFingerprint.of_folder(folders[0])
    PromptTokens(table(2, 1), base).save(path)
    return path


def calibrate(folders, path: Path, *more: str, data: Path | None = None) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    small = "--points 60 --prompt-length 8 --continue 12 --ranks 9 --cpu --quiet"
    paths = [str(path), "--model", str(folders[0]), "--data", str(data or folders[1])]
    return command.run(parser.parse_args([*paths, *small.split(), *more]))


def test_writes_table_record_and_plot(folders, prompts_folder, capsys):
    before = sorted(p.name for p in prompts_folder.iterdir())
    assert calibrate(folders, prompts_folder) == 0
    stats = AcceptanceStats.load(prompts_folder / "acceptance.json")
    assert stats.acceptance.shape == (2, 9)
    source = stats.source
    assert source["points"] >= 60 and source["temperature"] == 0
    assert source["base_model"]["name"] == "tiny"
    assert list(source["data_sha256"]) == ["text.txt"]
    assert {"torch", "transformers", "vllm_ppd"} <= set(source["versions"])
    assert len(source["top1_half_width_95"]) == 2
    assert len(source["reliability"]) == 2
    new = {p.name for p in prompts_folder.iterdir()} - set(before)
    plotted = "no plot" not in capsys.readouterr().out
    written = {"acceptance.json", "bigram.safetensors"}
    assert new == written | ({"acceptance.png"} if plotted else set())
    acceptance = AcceptanceModel.load(prompts_folder / "acceptance.json")
    assert acceptance.prompted.shape == (2, 9)
    table = prompts_folder / "bigram.safetensors"
    assert BigramTable.load(table, 257, 2).ids.shape == (257, 32)
    # Prompt tokens with an acceptance table are prompt tokens still.
    PromptTokens.load(prompts_folder)


def test_without_successors_the_evidence_is_the_prompt_rows_own(
    folders, prompts_folder
):
    (prompts_folder / "bigram.safetensors").write_bytes(b"of before")
    assert (
        calibrate(folders, prompts_folder, "--overwrite", "--bigram-entries", "0") == 0
    )
    assert not (prompts_folder / "bigram.safetensors").exists()
    stats = AcceptanceStats.load(prompts_folder / "acceptance.json")
    acceptance = AcceptanceModel.load(prompts_folder / "acceptance.json")
    # Of the same points, those at which steps begin.
    assert acceptance.overall[:2].any()
    assert not acceptance.overall[:2][stats.acceptance == 0].any()
    assert not acceptance.unprompted.any()


def test_without_matplotlib_there_is_no_plot(
    folders, prompts_folder, monkeypatch, capsys
):
    def missing(stats):
        raise ImportError

    monkeypatch.setattr(calibration_job, "draw", missing)
    assert calibrate(folders, prompts_folder) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (prompts_folder / "acceptance.png").exists()


def test_keeps_and_replaces_an_earlier_table(folders, prompts_folder, tmp_path):
    file = prompts_folder / "acceptance.json"
    file.write_text("precious")
    with pytest.raises(ValueError, match=r"there already.*--overwrite"):
        calibrate(folders, prompts_folder)
    assert file.read_text() == "precious"
    other = tmp_path / "other.json"
    assert calibrate(folders, prompts_folder, "--out", str(other)) == 0
    assert file.read_text() == "precious"
    assert calibrate(folders, prompts_folder, "--overwrite") == 0
    same = [json.loads(f.read_text())["acceptance"] for f in (file, other)]
    assert same[0] == same[1]


def test_a_failed_write_leaves_the_earlier_table(folders, prompts_folder, monkeypatch):
    file = prompts_folder / "acceptance.json"
    file.write_text("precious")
    before = sorted(p.name for p in prompts_folder.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_ppd.files.os.replace", full)
    with pytest.raises(AcceptanceError, match="No space left"):
        calibrate(folders, prompts_folder, "--overwrite")
    assert file.read_text() == "precious"
    assert sorted(p.name for p in prompts_folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ("--points 0", TrainingError, "points is 0"),
        ("--temperature -1", TrainingError, "temperature is -1"),
        ("--temperature nan", TrainingError, "temperature is nan"),
        ("--dtype int4", TrainingError, "dtype is 'int4'"),
        ("--continue 3", TrainingError, "too short for 2 prompt tokens.*at least 4"),
        ("--ranks 1000", TrainingError, "vocabulary has 257 tokens"),
        ("--continue 60", TrainingError, "length 68 exceeds the model's 64 positions"),
        ("--prompt-length 5000 --continue 9", TrainingError, "at least 5000"),
        ("--out nowhere/a.json", ValueError, "nowhere is no folder"),
        ("--out weights.bin", ValueError, "ending in .json"),
    ],
)
def test_bad_settings(folders, prompts_folder, flags, error, message):
    with pytest.raises(error, match=message):
        calibrate(folders, prompts_folder, *flags.split())
    assert not (prompts_folder / "acceptance.json").exists()


def test_bad_data_model_and_prompt_tokens(folders, prompts_folder, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(TrainingError, match="holds no text"):
        calibrate(folders, prompts_folder, data=empty)
    with pytest.raises(TrainingError, match="cannot be read"):
        calibrate(folders, prompts_folder, data=tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="missing"):
        calibrate(folders, tmp_path / "missing")
    base = BaseModelFingerprint.of_folder(folders[0])
    other = dataclasses.replace(base, embedding_sha256="0" * 64)
    PromptTokens(table(2, 1), other).save(tmp_path / "other")
    with pytest.raises(PromptTokensError, match="trained for 'tiny'"):
        calibrate(folders, tmp_path / "other")
