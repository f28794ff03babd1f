"""`vllm-ppd calibrate` writes its three files, or leaves no trace."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from unittest.mock import Mock

import pytest

from vllm_ppd.calibrate import job as calibration_job
from vllm_ppd.cli import calibrate as command
from vllm_ppd.prompt_tokens.tokens import PromptTokens, PromptTokensError
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.menu_search import build_menu
from vllm_ppd.train.settings import TrainingError
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.menu import load_menus


@pytest.fixture
def calibrate(model_folder: Path, data: Path, prompts_folder: Path):
    """Run the command."""

    def run(*more: str, path: Path = prompts_folder) -> int:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        small = "--points 60 --prompt-length 8 --continue 12 --ranks 9 --cpu --quiet"
        paths = [str(path), "--model", str(model_folder), "--data", str(data)]
        return command.run(parser.parse_args([*paths, *small.split(), *more]))

    return run


FILES = {"acceptance.json", "bigram.safetensors", "trees.json"}


def test_writes_acceptance_bigrams_and_menus(calibrate, prompts_folder, capsys):
    before = {p.name for p in prompts_folder.iterdir()}
    assert calibrate() == 0
    assert {p.name for p in prompts_folder.iterdir()} - before == FILES
    model = AcceptanceModel.load(prompts_folder / "acceptance.json", 2)
    assert model.prompted.shape == model.marginal.shape == (2, 9)
    assert 0 < model.marginal.sum(axis=1).min() < 1
    source = model.source
    assert source["points"] >= 60 and source["settings"]["temperature"] == 0
    assert source["base_model"]["name"] == "tiny"
    assert list(source["data_sha256"]) == ["train.jsonl"]
    assert {"torch", "transformers", "vllm_ppd"} <= set(source["versions"])
    assert len(source["top1_half_width_95"]) == 2
    bigram = BigramTable.load(prompts_folder / "bigram.safetensors", 257, 2)
    assert bigram.ids.shape == (257, 32)
    variable, fixed = load_menus(prompts_folder / "trees.json")
    for menu, rows in ((variable, 16), (fixed, 64)):
        assert menu.max_rows <= rows and menu.num_prompt_tokens == 2
    assert variable == build_menu(model, 16)
    assert all(entry.acceptance_length >= 1 for entry in fixed.entries)
    printed = capsys.readouterr().out
    assert "+2" in printed and "expected acceptance length" in printed
    # Prompt tokens with a calibration are prompt tokens still.
    PromptTokens.load(prompts_folder)


def test_without_a_bigram_table_the_prompt_rows_are_alone(calibrate, prompts_folder):
    (prompts_folder / "bigram.safetensors").write_bytes(b"of before")
    flags = "--overwrite --bigram-entries 0 --variable-rows 6 --fixed-rows 9"
    assert calibrate(*flags.split()) == 0
    variable, fixed = load_menus(prompts_folder / "trees.json")
    assert variable.max_rows <= 6 and fixed.max_rows <= 9
    assert not (prompts_folder / "bigram.safetensors").exists()
    model = AcceptanceModel.load(prompts_folder / "acceptance.json")
    # Of the same points, those at which steps begin.
    assert model.overall[:2].any()
    assert not model.overall[:2][model.marginal == 0].any()
    assert not model.unprompted.any()
    assert model.source["bigram"] is False


@pytest.mark.parametrize("name", sorted(FILES))
def test_keeps_and_replaces_an_earlier_one(calibrate, prompts_folder, tmp_path, name):
    file = prompts_folder / name
    file.write_text("precious")
    with pytest.raises(TrainingError, match=r"exists already.*--overwrite"):
        calibrate()
    assert file.read_text() == "precious"
    other = tmp_path / "other"
    other.mkdir()
    assert calibrate("--out", str(other)) == 0
    assert {p.name for p in other.iterdir()} == FILES
    assert file.read_text() == "precious"
    assert calibrate("--overwrite") == 0
    one, two = (
        AcceptanceModel.load(f / "acceptance.json") for f in (other, file.parent)
    )
    assert (one.marginal == two.marginal).all() and (one.ngram == two.ngram).all()


def test_a_failed_write_leaves_earlier_files(calibrate, prompts_folder, monkeypatch):
    for name in FILES:
        (prompts_folder / name).write_text("precious")
    before = sorted(p.name for p in prompts_folder.iterdir())
    full = Mock(side_effect=OSError(28, "No space left on device"))
    # The last of the three files is not written.
    monkeypatch.setattr(calibration_job, "save_menus", full)
    with pytest.raises(TrainingError, match="No space left"):
        calibrate("--overwrite")
    assert {(prompts_folder / name).read_text() for name in FILES} == {"precious"}
    assert sorted(p.name for p in prompts_folder.iterdir()) == before


def test_bad_prompt_tokens(calibrate, prompts_folder, tmp_path):
    prompts = PromptTokens.load(prompts_folder)
    other = dataclasses.replace(prompts.base, embedding_signs="0" * 512)
    PromptTokens(prompts.embeddings, other).save(tmp_path / "other")
    with pytest.raises(PromptTokensError, match="trained for 'tiny'"):
        calibrate(path=tmp_path / "other")
