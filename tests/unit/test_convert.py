"""The authors' checkpoints, read and written; test_bad_input.py has unusable ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.authors_checkpoint import write_authors_checkpoint
from tests.unit.refusals import refused
from tests.unit.tiny_base import tiny_llama
from vllm_ppd.cli import main
from vllm_ppd.cli.convert import convert
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens, PromptTokensError, tensor_file

HIDDEN, VOCAB = 16, 40
# The authors' subclass of PEFT's configuration adds these.
OF_THE_AUTHORS = {
    "num_special_tokens": 3,
    "virtual_tokens_per_special_token": 2,
    "vt_attention_type": "ensemble",
    "aggregation_type": "mean",
}
TABLE = torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    tiny_llama(VOCAB, hidden_size=HIDDEN).save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write_authors_checkpoint(tmp_path / "theirs", TABLE)


@pytest.fixture
def ours(tmp_path: Path, model: Path) -> Path:
    base = BaseModelFingerprint.of_folder(model, name="org/llama")
    PromptTokens(TABLE, base).save(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loads_directly(tmp_path: Path, pickled: bool, dtype: torch.dtype) -> None:
    table = TABLE.to(dtype)
    folder = write_authors_checkpoint(tmp_path / "theirs", table, pickled=pickled)
    original = (folder / "adapter_config.json").read_bytes()
    # A model's config beside it is not mistaken for its own.
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    loaded = PromptTokens.load(folder)
    assert torch.equal(loaded.embeddings, table.float())
    # The tensor's row order is the project's: token 3, EPT 1 is row 2 * 2 + 1.
    name = "adapter_model.bin" if pickled else "adapter_model.safetensors"
    assert tensor_file(folder) == folder / name
    assert torch.equal(loaded.rows[5], table[2, 1].float())
    assert loaded.base.name == "lmsys/vicuna-tiny"
    assert (loaded.base.architecture, loaded.base.vocab_size) == (None, None)
    assert (folder / "adapter_config.json").read_bytes() == original


def test_what_is_known_of_the_base_model_is_checked(theirs: Path, model: Path) -> None:
    prompts = PromptTokens.load(theirs)
    base = BaseModelFingerprint.of_folder(model)
    prompts.check_against(base)
    other = BaseModelFingerprint("x", None, "LlamaForCausalLM", 32, VOCAB, None)
    with refused(PromptTokensError, "hidden size 32 instead of 16"):
        prompts.check_against(other)
    with pytest.raises(PromptTokensError, match=r"unknown.*vllm-ppd convert --model"):
        prompts.save(theirs.parent / "new")
    assert not (theirs.parent / "new").exists()


@pytest.mark.parametrize("pickled", [False, True])
def test_round_trip(tmp_path: Path, model: Path, pickled: bool) -> None:
    theirs = write_authors_checkpoint(tmp_path / "theirs", TABLE, pickled=pickled)
    convert(str(theirs), tmp_path / "ours", model=str(model))
    ours = PromptTokens.load(tmp_path / "ours")
    assert torch.equal(ours.embeddings, TABLE)
    assert ours.base == BaseModelFingerprint.of_folder(model)
    assert ours.base.embedding_signs is not None
    convert(str(tmp_path / "ours"), tmp_path / "back", model=str(model))
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    original = json.loads((theirs / "adapter_config.json").read_text())
    # What the authors' code loads the base model from.
    assert config["base_model_name_or_path"] == str(model)
    for key in ("num_virtual_tokens", "token_dim", "peft_type", *OF_THE_AUTHORS):
        assert config[key] == original[key]
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert torch.equal(tensors.pop("prompt_embeddings"), TABLE.reshape(6, HIDDEN))
    assert not tensors
    assert torch.equal(PromptTokens.load(tmp_path / "back").embeddings, TABLE)


def test_peft_agrees(tmp_path: Path, model: Path) -> None:
    """The real library writes what is read here, and reads what is written."""
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    wrapped = peft.get_peft_model(base, config)
    weight = wrapped.prompt_encoder["default"].embedding.weight
    weight.data.copy_(TABLE.reshape(6, HIDDEN))
    wrapped.save_pretrained(tmp_path / "theirs")
    with pytest.raises(PromptTokensError, match="ordinary prompt tuning"):
        PromptTokens.load(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **OF_THE_AUTHORS}))
    assert torch.equal(PromptTokens.load(tmp_path / "theirs").embeddings, TABLE)

    convert(str(tmp_path / "theirs"), tmp_path / "ours", model=str(model))
    convert(str(tmp_path / "ours"), tmp_path / "back", model=str(model))
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    with pytest.warns(UserWarning, match="Unexpected keyword"):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "back")
    weight = loaded.prompt_encoder["default"].embedding.weight
    assert torch.equal(weight.detach(), TABLE.reshape(6, HIDDEN))


@pytest.mark.parametrize("missing", ["peft_type", "num_virtual_tokens", "num_exits"])
def test_what_need_not_be_said(tmp_path: Path, missing: str) -> None:
    folder = write_authors_checkpoint(tmp_path / "x", TABLE, **{missing: ...})
    assert PromptTokens.load(folder).num_ept == 2


def test_one_ept_has_one_mask(tmp_path: Path) -> None:
    for attention in ("decoder", "ensemble"):
        folder = write_authors_checkpoint(
            tmp_path / attention, TABLE[:, :1], vt_attention_type=attention
        )
        assert PromptTokens.load(folder).num_prompt_tokens == 3
    folder = write_authors_checkpoint(
        tmp_path / "encoder", TABLE[:, :1], vt_attention_type="encoder", base=None
    )
    with refused(PromptTokensError, "expected decoder or ensemble"):
        PromptTokens.load(folder)


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    folder = write_authors_checkpoint(tmp_path / "theirs", TABLE, pickled=True)
    harm = str(tmp_path / "harm")
    bad = {"prompt_embeddings": TABLE.reshape(6, HIDDEN), "more": Harmful(harm)}
    torch.save(bad, folder / "adapter_model.bin")
    with refused(PromptTokensError, "could run code"):
        PromptTokens.load(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(bad))
    with refused(PromptTokensError, "could run code"):
        PromptTokens.load(folder)
    assert not Path(harm).exists()


def test_a_folder_with_both_layouts_is_refused(ours: Path) -> None:
    write_authors_checkpoint(ours, TABLE)
    with pytest.raises(PromptTokensError, match="twice"):
        PromptTokens.load(ours)


def test_overwriting_replaces_the_whole_checkpoint(ours: Path, tmp_path: Path) -> None:
    table = torch.zeros(2, 1, HIDDEN)
    old = write_authors_checkpoint(tmp_path / "old", table, pickled=True)
    convert(str(ours), old, overwrite=True)
    assert torch.equal(PromptTokens.load(old).embeddings, TABLE)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(os.listdir(old)) == files
    # The recorded name, as no model was given.
    config = json.loads((old / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/llama"


def test_a_full_disk_leaves_no_trace(theirs, ours, model, tmp_path, full_disk):
    full_disk()
    for source in (theirs, ours):
        with refused(ValueError, "No space left"):
            convert(str(source), tmp_path / "new", model=str(model))
        assert os.listdir(tmp_path / "new") == []


def test_command(theirs: Path, model: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    assert main.main(["convert", str(theirs), out, "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "3 prompt tokens of 2 EPT for llama are in" in shown
    assert main.main(["inspect", out, "--model", str(model)]) == 0
    assert "0.0% of the embedding's signs differ" in capsys.readouterr().out
    assert main.main(["convert", out, str(tmp_path / "back")]) == 0
    assert "one EPT only" in capsys.readouterr().out
    # A model without weights is known by its sizes.
    no_weights = shutil.ignore_patterns("*.safetensors")
    bare = shutil.copytree(model, tmp_path / "bare", ignore=no_weights)
    argv = ["convert", str(theirs), out, "--model", str(bare), "--overwrite"]
    assert main.main(argv) == 0
    assert "holds only its sizes" in capsys.readouterr().out


def test_inspect_knows_the_layout(theirs: Path, model: Path, capsys) -> None:
    assert main.main(["inspect", str(theirs), "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    for word in ("lmsys/vicuna-tiny", "unknown", "with 2 EPT"):
        assert word in shown
    assert main.main(["inspect", "--json", str(theirs)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["format_version"] is None
    assert described["bytes"] > 6 * HIDDEN * 4
