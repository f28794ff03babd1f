"""Folders as the authors' code leaves them (PEFT prompt tuning), for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_authors_checkpoint(
    folder: Path,
    embeddings: torch.Tensor,
    *,
    base: str | None = "lmsys/vicuna-tiny",
    pickled: bool = False,
    **changes: Any,
) -> Path:
    """`embeddings` [m, e, hidden] as a checkpoint; a change of `...` removes a key."""
    m, e, hidden = embeddings.shape
    config = {
        "aggregation_type": "mean",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_attention_heads": 32,
        "num_exits": 1,
        "num_layers": 32,
        "num_special_tokens": m,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": m * e,
        "peft_type": "PROMPT_TUNING",
        "prefix_virtual_tokens": None,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Next 2 word",
        "revision": None,
        "task_type": None,
        "token_dim": hidden,
        "tokenizer_name_or_path": base,
        "use_cache": True,
        "use_custom_lm_head": False,
        "use_prefix_tuning": False,
        "virtual_tokens_per_special_token": e,
        "vt_attention_type": "ensemble" if e > 1 else "decoder",
    }
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    # Prompt token major, EPT minor.
    rows = {"prompt_embeddings": torch.cat(list(embeddings))}
    if pickled:
        torch.save(rows, folder / "adapter_model.bin")
    else:
        save_file(rows, folder / "adapter_model.safetensors")
    return folder
