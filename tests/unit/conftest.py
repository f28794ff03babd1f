"""A random chat model, a text and a training job that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_base import write_texts, write_tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer LLaMA of bytes with a chat template and 64 positions."""
    pytest.importorskip("transformers")
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
def job(model_folder: Path, data: Path, tmp_path: Path) -> Any:
    """A TrainJob of eight small steps."""
    pytest.importorskip("accelerate")
    from vllm_ppd.train.job import TrainJob
    from vllm_ppd.train.settings import TrainSettings
    from vllm_ppd.train.trainer import Schedule

    return TrainJob(
        model=str(model_folder),
        data=[str(data)],
        out=str(tmp_path / "out"),
        settings=TrainSettings(
            steps=8, length=24, batch_size=2, points=6, updates=2, learning_rate=0.01
        ),
        schedule=Schedule(evaluations=2, evaluation_sequences=4, checkpoint_every=3),
        cpu=True,
        quiet=True,
    )
