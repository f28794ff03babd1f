"""Checkpoints in the layout of the paper's authors (PEFT prompt tuning).

A folder holds `adapter_config.json` (PEFT's fields, and those of the authors' code:
`num_special_tokens` m, `virtual_tokens_per_special_token` e and how the ensemble
attends and is averaged) and one tensor `prompt_embeddings` [m * e, hidden], prompt
token major and EPT minor, in `adapter_model.safetensors` or `adapter_model.bin`. About
the base model it has only a name. The .bin is a pickle: only tensors are read from it,
and no code in it is run.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from vllm_ppd.files import read_object, write_bytes, write_json
from vllm_ppd.prompt_tokens.fingerprint import PromptTokensError

ADAPTER_CONFIG = "adapter_config.json"
TENSOR_NAME = "prompt_embeddings"
# PEFT, too, takes the first that is there.
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_TYPE = "PROMPT_TUNING"

# Variants that the authors' code can train, but that cannot be decoded:
# key -> (the only value for PPD, which is also the default; what another value means).
_VARIANTS: dict[str, tuple[Any, str]] = {
    "use_custom_lm_head": (False, "a vocabulary head of its own"),
    "use_prefix_tuning": (False, "prefix tuning"),
    "num_exits": (1, "outputs averaged over several layers"),
    "aggregation_type": ("mean", "weighted ensembles"),
}


def is_peft_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter, of any kind."""
    return (folder / ADAPTER_CONFIG).exists()


def weights_file(folder: Path) -> Path:
    """The file with the embeddings. Raises PromptTokensError if there is none."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise PromptTokensError(
        f"{str(folder)!r} has {ADAPTER_CONFIG} but neither "
        f"{' nor '.join(WEIGHTS_FILES)}; copy the whole folder"
    )


def read_checkpoint(folder: Path) -> tuple[torch.Tensor, str | None]:
    """Read a folder strictly.

    Returns:
        embeddings [m, e, hidden] of any floating dtype, and the base model's hub id or
        path on the machine that trained, if the folder names one.

    Raises:
        FormatError, PromptTokensError: one sentence with the path, for a missing or
            corrupt file, another kind of adapter, and the variants of the authors' code
            that parallel prompt decoding does not have.
    """
    path = folder / ADAPTER_CONFIG
    config = read_object(path, "the adapter's configuration", "restore the file")
    # The authors' loader removes peft_type from the file it reads.
    kind = config.get("peft_type", _PEFT_TYPE)
    if kind != _PEFT_TYPE:
        raise PromptTokensError(
            f"{path} describes a {kind} adapter; expected prompt tokens "
            f"(peft_type {_PEFT_TYPE})"
        )
    m = _positive_int(path, config, "num_special_tokens")
    e = _positive_int(path, config, "virtual_tokens_per_special_token")
    _check_variant(path, config, m, e)
    tensor = _read_tensor(weights_file(folder))
    if tensor.dim() != 2 or tensor.shape[0] != m * e:
        raise PromptTokensError(
            f"{weights_file(folder)} holds {TENSOR_NAME} {list(tensor.shape)}, but "
            f"{path} says {m} prompt tokens of {e} EPT, hence [{m * e}, hidden]; "
            "the two files do not belong together"
        )
    for key, value in (("num_virtual_tokens", m * e), ("token_dim", tensor.shape[1])):
        if config.get(key) not in (None, value):
            raise PromptTokensError(
                f"{path} has {key} {config[key]!r}, but its other entries and the "
                f"embeddings make it {value}; restore the file"
            )
    name = config.get("base_model_name_or_path")
    return tensor.reshape(m, e, -1), name if isinstance(name, str) and name else None


def write_checkpoint(folder: Path, embeddings: torch.Tensor, base_model: str) -> None:
    """Write the folder, each file completely or not at all, over an earlier one.

    Args:
        folder: is made if need be.
        embeddings: [m, e, hidden].
        base_model: the name from which the authors' code fetches the base model.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    m, e, hidden = embeddings.shape
    rows = embeddings.reshape(m * e, hidden).contiguous().cpu()
    config = {
        "peft_type": _PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": m * e,
        "token_dim": hidden,
        # Not TEXT, for which PEFT would fetch a tokenizer before loading.
        "prompt_tuning_init": "RANDOM",
        "num_special_tokens": m,
        "virtual_tokens_per_special_token": e,
        "vt_attention_type": "ensemble",
        **{key: value for key, (value, _) in _VARIANTS.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = serialise({TENSOR_NAME: rows}, metadata={"format": "pt"})
    write_bytes(folder / WEIGHTS_FILES[0], content)
    write_json(folder / ADAPTER_CONFIG, config)
    # An earlier checkpoint's, which this one's file would only hide.
    (folder / WEIGHTS_FILES[1]).unlink(missing_ok=True)


def _positive_int(path: Path, config: dict[str, Any], key: str) -> int:
    if key not in config:
        raise PromptTokensError(
            f"{path} lacks {key!r}: it is ordinary prompt tuning, not prompt tokens "
            "for parallel decoding"
        )
    value = config[key]
    if type(value) is not int or value < 1:
        raise PromptTokensError(
            f"{key} in {path} is {value!r}; expected a positive integer"
        )
    return value


def _check_variant(path: Path, config: dict[str, Any], m: int, e: int) -> None:
    for key, (value, otherwise) in _VARIANTS.items():
        if config.get(key, value) != value:
            raise PromptTokensError(
                f"{path} has {key} {config[key]!r}: these prompt tokens were trained "
                f"with {otherwise}, which cannot be decoded; expected {value!r}"
            )
    attention = config.get("vt_attention_type", "decoder")
    # With one EPT "decoder" and "ensemble" are the same mask, with one token all are.
    equal = ["decoder", "ensemble"] if e == 1 else ["ensemble"]
    if attention not in equal and not (m == e == 1):
        raise PromptTokensError(
            f"{path} has vt_attention_type {attention!r} with {m} prompt tokens of {e} "
            f"EPT, which cannot be decoded; expected {' or '.join(equal)}"
        )


def _read_tensor(path: Path) -> torch.Tensor:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PromptTokensError(
            f"{path} is damaged or holds more than tensors, and loading that could run "
            "code; write it again as safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PromptTokensError(
            f"{path} is not a readable checkpoint ({reason}); copy it again"
        ) from error
    names = list(tensors) if isinstance(tensors, dict) else type(tensors).__name__
    if names != [TENSOR_NAME] or not isinstance(tensors[TENSOR_NAME], torch.Tensor):
        raise PromptTokensError(
            f"{path} holds {names}; expected the tensor {TENSOR_NAME!r} alone"
        )
    return tensors[TENSOR_NAME]
