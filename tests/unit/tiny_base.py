"""Random models, a byte tokenizer and texts, for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_ppd.train.settings import TrainSettings

# Of a training of eight small steps.
SETTINGS = TrainSettings(
    steps=8, length=24, batch_size=2, points=6, updates=2, learning_rate=0.01
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_llama(vocabulary: int, seed: int = 0, **changes: Any) -> Any:
    """A two-layer LLaMA in float32; large weights make distributions peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {**SIZES, "initializer_range": 0.3, **changes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **settings)).float()


def write_tiny_model(folder: Path, chat_template: str | None = None) -> None:
    """A two-layer LLaMA of bytes, with 64 positions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    two_heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_llama(len(vocabulary), initializer_range=0.2, **two_heads)
    model.save_pretrained(folder)


def write_weights(
    folder: Path, weight: torch.Tensor, name: str = "model.embed_tokens"
) -> Path:
    """What is looked at of a LLaMA: its sizes, and its input embeddings."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"]}
    sizes = dict(zip(("vocab_size", "hidden_size"), weight.shape, strict=True))
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    tensors = {f"{name}.weight": weight, "model.norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_texts(file: Path) -> None:
    """Twenty lines of {"text": ...} with some 150 bytes each."""
    chooser = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "(x)", "= 1"]
    texts = [" ".join(chooser.choices(words, k=30)) for _ in range(20)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
