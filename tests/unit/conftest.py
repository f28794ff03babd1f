"""A random chat model, a text, a training job and a full disk, for many tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.unit.tiny_base import SETTINGS, write_texts, write_tiny_model
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer LLaMA of bytes with a chat template and 64 positions."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_model(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty lines of {"text": ...}."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_texts(path)
    return path


@pytest.fixture
def prompts_folder(model_folder: Path, tmp_path: Path) -> Path:
    """Two random prompt tokens for the model."""
    table = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(2))
    base = BaseModelFingerprint.of_folder(model_folder)
    PromptTokens(table, base).save(tmp_path / "prompts")
    return tmp_path / "prompts"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on nothing can be written."""
    fsync = Mock(side_effect=OSError(28, "No space left on device"))
    return lambda: monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def job(model_folder: Path, data: Path, tmp_path: Path) -> Any:
    """A TrainJob of eight small steps."""
    from vllm_ppd.train.job import TrainJob
    from vllm_ppd.train.trainer import Schedule

    return TrainJob(
        model=str(model_folder),
        data=[str(data)],
        out=str(tmp_path / "out"),
        settings=SETTINGS,
        schedule=Schedule(evaluations=2, evaluation_sequences=4, checkpoint_every=3),
        cpu=True,
        quiet=True,
    )
