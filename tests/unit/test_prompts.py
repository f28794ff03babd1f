"""Prompt tokens on disk, and the fingerprint of their base model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.refusals import refused
from tests.unit.tiny_base import write_weights
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens, PromptTokensError

HIDDEN = 8
VOCAB = 300
BASE = BaseModelFingerprint("org/base", None, "LlamaForCausalLM", HIDDEN, VOCAB, None)


def make_prompts(m: int = 3, e: int = 2, base: BaseModelFingerprint = BASE):
    generator = torch.Generator().manual_seed(0)
    return PromptTokens(torch.randn(m, e, HIDDEN, generator=generator), base)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_prompts().save(tmp_path / "prompts")
    return tmp_path / "prompts"


def test_round_trip(folder: Path) -> None:
    original, loaded = make_prompts(), PromptTokens.load(folder)
    assert torch.equal(original.embeddings, loaded.embeddings)
    assert loaded.base == original.base
    sizes = loaded.num_prompt_tokens, loaded.num_ept, loaded.hidden_size
    assert sizes == (3, 2, HIDDEN)
    # Prompt-token major, EPT minor: row i * e + j is token i, EPT j.
    assert torch.equal(loaded.rows[2 * 2 + 1], original.embeddings[2, 1])
    assert sorted(os.listdir(folder)) == ["config.json", "prompt_tokens.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_is_read(folder: Path, dtype: torch.dtype) -> None:
    tensor = make_prompts().embeddings.to(dtype)
    save_file({"embeddings": tensor}, folder / "prompt_tokens.safetensors")
    loaded = PromptTokens.load(folder)
    assert loaded.embeddings.dtype == torch.float32
    assert torch.equal(loaded.embeddings, tensor.float())


def test_other_files_are_ignored_and_kept(folder: Path) -> None:
    for name in ("acceptance.json", "README.md", "training.json"):
        (folder / name).write_text("not ours")
    PromptTokens.load(folder)
    make_prompts(m=1).save(folder, overwrite=True)
    assert (folder / "acceptance.json").read_text() == "not ours"
    assert PromptTokens.load(folder).num_prompt_tokens == 1


def test_failed_save_leaves_nothing_half_written(folder: Path, full_disk) -> None:
    original = PromptTokens.load(folder).embeddings
    full_disk()
    with refused(PromptTokensError, "No space left"):
        make_prompts(m=1).save(folder, overwrite=True)
    assert torch.equal(PromptTokens.load(folder).embeddings, original)
    assert len(os.listdir(folder)) == 2


def test_bad_tensors_in_memory() -> None:
    with refused(PromptTokensError, "each at least 1"):
        PromptTokens(torch.zeros(0, 1, HIDDEN), BASE)


def test_check_against_accepts_copies() -> None:
    base = dataclasses.replace(BASE, embedding_signs="a" * 64)
    for ours, model in ((base, base), (base, BASE), (BASE, base)):
        copy = dataclasses.replace(model, name="copy")
        assert make_prompts(base=ours).check_against(copy) is None


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_fingerprint_agrees_across_copies(tmp_path: Path, weight) -> None:
    half = weight.to(torch.bfloat16)
    folders = [
        write_weights(tmp_path / str(i), w)
        for i, w in enumerate((weight, half, half.float(), weight))
    ]
    # The last one is in two files.
    (folders[3] / "model.safetensors").rename(folders[3] / "part-2.safetensors")
    save_file({"lm_head.weight": weight + 1}, folders[3] / "part-1.safetensors")
    (same,) = {BaseModelFingerprint.of_folder(each, name="x") for each in folders}
    assert same.embedding_signs is not None
    # Weights in 4 bits are warned of; another tokenizer's rows are refused.
    prompts, step = make_prompts(base=same), weight.abs().amax(1, keepdim=True) / 7
    rounded = write_weights(tmp_path / "rounded", (weight / step).round() * step)
    fingerprint = BaseModelFingerprint.of_folder(rounded)
    assert fingerprint.name == "rounded"
    assert 0.01 < same.drift(fingerprint) < 0.09
    assert "fewer drafts may be accepted" in prompts.check_against(fingerprint)
    other = write_weights(tmp_path / "other", weight.roll(1, 0))
    with refused(PromptTokensError, "another tokenizer"):
        prompts.check_against(BaseModelFingerprint.of_folder(other))


@pytest.mark.parametrize(
    "name",
    ["transformer.wte", "word_embeddings", "gpt_neox.embed_in", "tok_embeddings"],
)
def test_fingerprint_knows_other_names(tmp_path: Path, weight, name: str) -> None:
    model = write_weights(tmp_path / "model", weight, name)
    assert BaseModelFingerprint.of_folder(model).embedding_signs is not None


def test_fingerprint_without_weights(tmp_path: Path, weight: torch.Tensor) -> None:
    model = write_weights(tmp_path / "model", weight)
    (model / "model.safetensors").unlink()
    config = {"architectures": ["Gemma3ForConditionalGeneration"]}
    config["text_config"] = {"hidden_size": HIDDEN, "vocab_size": VOCAB}
    (model / "config.json").write_text(json.dumps(config))
    fingerprint = BaseModelFingerprint.of_folder(model)
    assert fingerprint.embedding_signs is None
    assert (fingerprint.hidden_size, fingerprint.vocab_size) == (HIDDEN, VOCAB)


def test_resolve_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Mock(return_value=str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_path(tmp_path) == tmp_path
    fetch.assert_not_called()
    assert resolve_path("owner/prompts") == tmp_path
    patterns = ["*.json", "*.safetensors", "adapter_model.bin"]
    fetch.assert_called_once_with("owner/prompts", allow_patterns=patterns)
