"""A random model with a byte tokenizer, and texts, for tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write_tiny_model(folder: Path, chat_template: str | None = None) -> None:
    """A two-layer LLaMA of bytes, with 64 positions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_texts(file: Path) -> None:
    """Twenty lines of {"text": ...} with some 150 bytes each."""
    chooser = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "(x)", "= 1"]
    texts = [" ".join(chooser.choices(words, k=30)) for _ in range(20)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
