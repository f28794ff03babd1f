"""A random chat model, a text and a training job that the tests of training share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer LLaMA of bytes with a chat template and 64 positions."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty lines of {"text": ...}."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    chooser = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "(x)", "= 1"]
    lines = [
        json.dumps({"text": " ".join(chooser.choices(words, k=30))}) for _ in range(20)
    ]
    path.write_text("\n".join(lines) + "\n")
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
