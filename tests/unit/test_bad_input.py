"""Inputs that cannot be used: each gets one sentence, and no file is harmed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from vllm.platforms import CpuArchEnum

from tests.authors_checkpoint import write_authors_checkpoint
from tests.unit.bad_inputs import BAD, CUT, FOLDER, GONE, TABLE
from tests.unit.models import random_model
from tests.unit.refusals import contents, refused
from vllm_ppd.cli import main
from vllm_ppd.cli.engines import EngineProcess
from vllm_ppd.config import PPDConfig
from vllm_ppd.engine import select
from vllm_ppd.engine.refusals import refuse_unsupported, require_supported_vllm
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.search.menu_search import build_menu
from vllm_ppd.train.data import read_stream
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.menu import load_menus, save_menus

CASES = [(heading, *row) for heading, rows in BAD.items() for row in rows]
TRAIN = (
    "train --model {model} --out {out} --length 24 --batch-size 2 --points 4 --cpu "
    "--quiet"
)
COMMANDS = {
    "train": f"{TRAIN} --data {{data}}",
    "train --steps 4": f"{TRAIN} --data {{data}} --steps 4",
    "train --self-distill": f"{TRAIN} --steps 4 --self-distill-tokens 9 --self-distill",
    "calibrate": "calibrate {prompts} --model {model} --data {data} --points 40 "
    "--prompt-length 8 --continue 12 --ranks 9 --cpu --quiet",
    "demo": "demo --model {model}",
    **{name: name for name in ("inspect", "convert", "profile", "tree")},
    "verify": "verify {model} {prompts}",
}
CHAT = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ""}]
TEXTS = {
    "void": "",
    "short": '{"text": "too short"}',
    "few": 7 * '{"prompt": "a"}\n',
    "asks": 9 * '{"prompt": "a"}\n',
    "chats": 30 * (json.dumps({"messages": CHAT}) + "\n"),
}
MENU, OTHER_MENU = (build_menu(AcceptanceModel.typical(m), 6) for m in (2, 3))
PROFILE = LatencyProfile((1, 4), (1, 2), ((1.0, 2.0), (2.0, 4.0)), {"model": "a"})
# Makers of what is not always there.
MADE: dict[str, Callable[[Path], Any]] = {
    "empty": Path.mkdir,
    "theirs": lambda path: write_authors_checkpoint(path, TABLE),
    "narrow": lambda path: write_authors_checkpoint(path, TABLE[..., :16]),
    "lora": lambda path: write_authors_checkpoint(path, TABLE, peft_type="LORA"),
    "pickled": lambda path: write_authors_checkpoint(path, TABLE, pickled=True),
    "menu": lambda path: save_menus(path, OTHER_MENU, OTHER_MENU),
    "trees.json": lambda path: save_menus(path, MENU, MENU),
    "acceptance.json": random_model(3, m=2, ranks=2, classes=2).save,
    "profile.json": PROFILE.save,
    "bigram.safetensors": BigramTable.empty(6, 3, (1.0, 1.0)).save,
}


# What copies of the model lack.
WITHOUT = {
    "no_weights": "model.safetensors",
    "no_tokenizer": "tokenizer.json",
    "no_template": "chat_template.jinja",
}


class Place(dict):
    """Files and folders by name, some of them made when they are asked for."""

    def __init__(self, folder: Path, model: Path, data: Path, prompts: Path) -> None:
        self.folder = folder
        model = shutil.copytree(model, folder / "model")
        data = shutil.copy(data, folder / "text.jsonl")
        super().__init__(model=model, data=data, prompts=prompts)

    def __missing__(self, name: str) -> Path:
        path = self.folder / name
        if name in TEXTS:
            path = path.with_suffix(".jsonl")
            path.write_text(TEXTS[name])
        elif name in MADE:
            MADE[name](path)
        elif name in WITHOUT:
            left_out = shutil.ignore_patterns(WITHOUT[name])
            shutil.copytree(self["model"], path, ignore=left_out)
        return path


def read_text(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path.with_name("model"))
    read_stream([path], tokenizer, max_tokens=999, least_tokens=24)


def load_prompts(path: Path) -> PromptTokens:
    return PromptTokens.load(path.parent)


def fingerprint(path: Path) -> BaseModelFingerprint:
    return BaseModelFingerprint.of_folder(path.parent)


# Where a good file is, and what reads it.
FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "acceptance.json": ("acceptance.json", AcceptanceModel.load),
    "trees.json": ("trees.json", load_menus),
    "profile.json": ("profile.json", lambda p: LatencyProfile.load(p, PROFILE.key)),
    "bigram.safetensors": ("bigram.safetensors", lambda p: BigramTable.load(p, 6, 2)),
    "text.jsonl": ("data", read_text),
    "config.json": ("prompts/config.json", load_prompts),
    "prompt_tokens.safetensors": ("prompts/prompt_tokens.safetensors", load_prompts),
    "adapter_config.json": ("theirs/adapter_config.json", load_prompts),
    "adapter_model.safetensors": ("theirs/adapter_model.safetensors", load_prompts),
    "adapter_model.bin": ("pickled/adapter_model.bin", load_prompts),
    "a model's config.json": ("model/config.json", fingerprint),
    "a model's model.safetensors": ("model/model.safetensors", fingerprint),
}


def good_file(place: Place, heading: str) -> tuple[Path, Callable[[Path], Any]]:
    where, read = FILES[heading]
    name, _, rest = where.partition("/")
    path = Path(place[name]) / rest
    read(path)
    return path, read


def put(path: Path, change: Any) -> None:
    """Change a JSON file, or replace a file by something else."""
    content = path.read_bytes()
    if callable(change) or (path.suffix == ".json" and isinstance(change, dict)):
        values = json.loads(content)
        change(values) if callable(change) else merge(values, change)
        path.write_text(json.dumps(values))
        return
    path.unlink()
    if change is FOLDER:
        path.mkdir()
    elif change is CUT:
        path.write_bytes(content[:-4])
    elif isinstance(change, str):
        path.write_text(change, encoding="latin-1")
    elif isinstance(change, BigramTable):
        change.save(path)
    elif isinstance(change, dict):
        save_file({name: tensor.clone() for name, tensor in change.items()}, path)
    elif change is not GONE:
        torch.save(change, path)


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if value is ...:
            del values[key]
        elif isinstance(value, dict) and key in values:
            merge(values[key], value)
        else:
            values[key] = value


class Off(SimpleNamespace):
    """vLLM's settings; those that are not named are off."""

    def __getattr__(self, name: str) -> None:
        return None


def vllm_settings(
    on_v2: bool = True, backend: Any = None, per_kind: Any = (), **given: Any
) -> None:
    kinds = ("pipeline", "decode_context", "prefill_context")
    settings: dict[str, Any] = {f"{kind}_parallel_size": 1 for kind in kinds}
    settings |= {"runner_type": "generate", "worker_cls": "auto"}
    settings |= {"kv_cache_dtype": "auto", "dtype": torch.bfloat16}
    attention = SimpleNamespace(backend=backend, backend_per_kind=dict(per_kind))
    off = Off(**{**settings, "attention_config": attention, **given})
    refuse_unsupported(off, off, off, on_v2)


def run_command(argv: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        assert main.main(argv) == 2
    first, *others = said.getvalue().splitlines()
    # Python says how the command is used, too, if the flags cannot be read.
    assert first.startswith("usage: ") or not others, said.getvalue()
    raise ValueError([first, *others][-1])


def reading(place: Place, patch: pytest.MonkeyPatch, heading: str, given: Any) -> Any:
    """What will refuse the input; all files are there then."""
    if heading in COMMANDS:
        words = f"{COMMANDS[heading]} {given}".format_map(place).split()
        for variable in [word for word in words if word[0].isupper()]:
            words.remove(variable)
            patch.setenv(*variable.split("="))
        return lambda: run_command(words)
    if heading in FILES:
        path, read = good_file(place, heading)
        put(path, given)
        return lambda: read(path)
    if heading == "prompt tokens":
        path = Path(place[given])
        return lambda: PromptTokens.load(path)
    if heading == "another model":
        base = BaseModelFingerprint.of_folder(place["model"])
        other = dataclasses.replace(base, **given)
        return lambda: PromptTokens.load(place["prompts"]).check_against(other)
    if heading == "the machine":
        device, processor, version = given
        architecture = getattr(CpuArchEnum, processor)
        platform = SimpleNamespace(
            device_type=device, get_cpu_architecture=lambda: architecture
        )
        patch.setattr(select, "current_platform", platform)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", version)
        speculative = {"method": "ppd", "model": "a"}
        return lambda: select.create_ppd_config(None, speculative, None, None)
    functions: dict[str, Callable[[], Any]] = {
        "vLLM's settings": lambda: vllm_settings(**given),
        "vLLM's version": lambda: require_supported_vllm(given),
        "a path": lambda: resolve_path(given.format_map(place)),
        "speculative_config": lambda: PPDConfig.from_speculative(
            {"model": "ppd:x", **given}
        ),
    }
    return functions[heading]


@pytest.fixture
def place(tmp_path, model_folder, data, prompts_folder, monkeypatch) -> Place:
    started = Mock(side_effect=AssertionError("an engine starts"))
    offline = Mock(side_effect=ConnectionError("no route to host\nsecond line"))
    monkeypatch.setattr(EngineProcess, "__init__", started)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    return Place(tmp_path, model_folder, data, prompts_folder)


@pytest.mark.parametrize(
    ("heading", "given", "value", "what_to_do"),
    CASES,
    ids=[f"{heading}: {value}" for heading, _, value, _ in CASES],
)
def test_one_sentence(place, monkeypatch, heading, given, value, what_to_do) -> None:
    read = reading(place, monkeypatch, heading, given)
    original = contents(place.folder)
    with refused(ValueError, value, what_to_do):
        read()
    assert contents(place.folder) == original


def test_the_table_has_many_different_rows() -> None:
    rows = {(heading, repr(given), value) for heading, given, value, _ in CASES}
    assert len(rows) == len(CASES) >= 60
    assert all(value and what_to_do for _, _, value, what_to_do in CASES)


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, and each key or index in it."""
    for key in values if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from places(values[key])


@pytest.mark.parametrize("heading", [name for name in FILES if name.endswith(".json")])
def test_any_value_anywhere(place: Place, heading: str) -> None:
    """A JSON file with a wrong value is read, or refused by name."""
    path, read = good_file(place, heading)
    whole = json.loads(path.read_text())
    # Weights take time to read.
    path.with_name("model.safetensors").unlink(missing_ok=True)
    count = len(list(places(whole)))
    for number in range(0, count, 1 + count // 50):
        for odd in (None, True, -1, 10**400, 0.5, float("inf"), "a", [], [[]], {}):
            values = copy.deepcopy(whole)
            container, key = list(places(values))[number]
            container[key] = odd
            path.write_text(json.dumps(values))
            try:
                read(path)
            except ValueError as error:
                message = str(error)
                assert str(path.parent) in message and "\n" not in message


def test_settings_that_are_served() -> None:
    vllm_settings()
    vllm_settings(backend="CUSTOM")
    vllm_settings(attention_backend="auto")
    vllm_settings(attention_backend="TORCH_SDPA", on_v2=False)
