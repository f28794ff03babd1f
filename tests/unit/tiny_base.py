"""A random model with a byte tokenizer, and texts, for tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_tiny_model(folder: Path) -> None:
    """A two-layer LLaMA of bytes, with 256 positions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_texts(file: Path, count: int = 20, seed: int = 0) -> None:
    """Lines of {"text": ...} with some 150 bytes each."""
    chooser = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "(x)", "= 1"]
    texts = [" ".join(chooser.choices(words, k=30)) for _ in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
