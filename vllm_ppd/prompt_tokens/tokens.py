"""Trained prompt tokens (the paper's prompt tokens and EPT) on disk and in memory.

A prompt-token folder holds `config.json`
`{"format": "ppd_prompt_tokens", "format_version": 1, "num_prompt_tokens": m,
"num_ept": e, "hidden_size": h, "base_model": {...}}` and `prompt_tokens.safetensors`
with one tensor `embeddings` [m, e, h] of any floating dtype. Other files beside them
(acceptance.json, training.json, README.md) belong to other readers. Folders in the
authors' layout (vllm_ppd.prompt_tokens.peft) are read as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from vllm_ppd.files import write_bytes, write_json
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint, FingerprintError
from vllm_ppd.prompt_tokens.peft import (
    ADAPTER_CONFIG,
    PeftCheckpoint,
    PeftCheckpointError,
    is_peft_checkpoint,
    weights_file,
)

__all__ = [
    "BaseModelFingerprint",
    "PromptTokens",
    "PromptTokensError",
    "check_destination",
    "tensor_file",
]

FORMAT = "ppd_prompt_tokens"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "prompt_tokens.safetensors"
TENSOR_NAME = "embeddings"

_SIZES = ("num_prompt_tokens", "num_ept", "hidden_size")
_KEYS = ("format", "format_version", *_SIZES, "base_model")
_BASE_KEYS = tuple(f.name for f in dataclasses.fields(BaseModelFingerprint))


class PromptTokensError(ValueError):
    """Prompt tokens that cannot be read, written or used; the message says which."""


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """m prompt tokens of e ensemble members (EPT) each, and the model they belong to.

    Raises PromptTokensError unless `embeddings` is a finite floating tensor [m, e,
    hidden] whose width is the base model's; it is stored as contiguous float32.
    """

    embeddings: torch.Tensor
    """float32 [m, e, hidden]; prompt token i, EPT j is `embeddings[i - 1, j]`."""
    base: BaseModelFingerprint

    def __post_init__(self) -> None:
        tensor = self.embeddings
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise PromptTokensError(
                f"embeddings are {kind}; expected a floating-point tensor"
            )
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise PromptTokensError(
                f"embeddings have shape {list(tensor.shape)}; expected "
                "[prompt tokens, EPT, hidden], each at least 1"
            )
        if tensor.shape[2] != self.base.hidden_size:
            raise PromptTokensError(
                f"embeddings are {tensor.shape[2]} wide, but the base model "
                f"{self.base.name!r} has hidden size {self.base.hidden_size}"
            )
        tensor = tensor.detach().float().contiguous()
        finite = torch.isfinite(tensor).all(dim=-1)
        if not bool(finite.all()):
            i, j = (~finite).nonzero()[0].tolist()
            raise PromptTokensError(
                f"embeddings of prompt token {i + 1} (EPT {j}) hold NaN or infinity; "
                "the training run that wrote them diverged"
            )
        object.__setattr__(self, "embeddings", tensor)

    @property
    def num_prompt_tokens(self) -> int:
        """m: how many tokens beyond the next one are guessed."""
        return self.embeddings.shape[0]

    @property
    def num_ept(self) -> int:
        """e: ensemble members per prompt token."""
        return self.embeddings.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.embeddings.shape[2]

    @property
    def rows(self) -> torch.Tensor:
        """[m * e, hidden]: prompt-token major, EPT minor (as the authors store it)."""
        return self.embeddings.reshape(-1, self.hidden_size)

    def check_against(self, fingerprint: BaseModelFingerprint) -> None:
        """Raise PromptTokensError, naming every mismatch, unless made for that model.

        What either side does not know is not compared: the embeddings' hash, and of
        the authors' checkpoints all but the hidden size.
        """
        differences = self.base.differences(fingerprint)
        if differences:
            raise PromptTokensError(
                f"these prompt tokens were trained for {self.base.name!r}, but the "
                f"model {fingerprint.name!r} has {', '.join(differences)}; use prompt "
                "tokens trained for it, or train some with vllm-ppd train"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PromptTokens:
        """Read a prompt-token folder, or one in the authors' layout, strictly.

        The latter names its base model and says nothing else about it. Raises
        PromptTokensError, one sentence with the path, for anything missing, unknown,
        mistyped, corrupt or inconsistent.
        """
        folder = Path(path)
        if _has_peft_layout(folder):
            return cls._load_peft(folder)
        config = _read_config(folder)
        where = str(folder / CONFIG_FILE)
        _check_keys(where, config, _KEYS)
        sizes = tuple(_positive_int(where, config, key) for key in _SIZES)
        base_config = config["base_model"]
        if not isinstance(base_config, dict):
            raise PromptTokensError(
                f"base_model in {where} is {base_config!r}; expected an object"
            )
        _check_keys(f"base_model in {where}", base_config, _BASE_KEYS)
        for key in ("architecture", "vocab_size"):
            if base_config[key] is None:
                raise PromptTokensError(
                    f"{key} of base_model in {where} is null; write the prompt tokens "
                    "again, or restore the file"
                )
        try:
            base = BaseModelFingerprint(**base_config)
        except FingerprintError as error:
            raise PromptTokensError(f"{where}: {error}") from error
        embeddings = _read_embeddings(folder / TENSOR_FILE)
        if tuple(embeddings.shape) != sizes:
            raise PromptTokensError(
                f"{folder / TENSOR_FILE} holds embeddings {list(embeddings.shape)}, "
                f"but {where} says {list(sizes)} ({', '.join(_SIZES)}); the two files "
                "do not belong together"
            )
        try:
            return cls(embeddings, base)
        except PromptTokensError as error:
            raise PromptTokensError(f"{folder}: {error}") from error

    @classmethod
    def _load_peft(cls, folder: Path) -> PromptTokens:
        try:
            found = PeftCheckpoint.load(folder)
        except PeftCheckpointError as error:
            raise PromptTokensError(str(error)) from error
        base = BaseModelFingerprint(
            name=found.base_model or "unknown",
            revision=None,
            architecture=None,
            hidden_size=found.embeddings.shape[2],
            vocab_size=None,
            embedding_sha256=None,
        )
        try:
            return cls(found.embeddings, base)
        except PromptTokensError as error:
            raise PromptTokensError(f"{folder}: {error}") from error

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a prompt-token folder; other files in it are left alone.

        Each file appears completely or not at all, config.json last, so an interrupted
        save never looks like a finished one. Raises PromptTokensError when prompt
        tokens are there already and not `overwrite`, when the folder belongs to
        something else, when too little is known about the base model, and when it
        cannot be written.
        """
        folder = Path(path)
        check_destination(folder, overwrite=overwrite)
        if None in (self.base.architecture, self.base.vocab_size):
            raise PromptTokensError(
                f"architecture and vocabulary of the base model {self.base.name!r} are "
                "unknown, and a prompt-token folder names them; convert with "
                "vllm-ppd convert --model"
            )
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_ept": self.num_ept,
            "hidden_size": self.hidden_size,
            "base_model": dataclasses.asdict(self.base),
        }
        content = serialise(
            {TENSOR_NAME: self.embeddings.cpu()}, metadata={"format": "pt"}
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / TENSOR_FILE, content)
            write_json(folder / CONFIG_FILE, config)
        except OSError as error:
            raise PromptTokensError(
                f"prompt tokens cannot be written to {folder}: {error}"
            ) from error


def check_destination(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise PromptTokensError if `PromptTokens.save` would refuse the folder."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise PromptTokensError(f"{folder} is a file; expected a folder to write into")
    if is_peft_checkpoint(folder):
        raise PromptTokensError(
            f"{folder} is a PEFT checkpoint (it has {ADAPTER_CONFIG}); choose another "
            "folder"
        )
    existing = [n for n in (CONFIG_FILE, TENSOR_FILE) if (folder / n).exists()]
    if not existing:
        return
    if not overwrite:
        raise PromptTokensError(
            f"{folder} already has {' and '.join(existing)}; "
            "choose another folder, or allow overwriting"
        )
    if CONFIG_FILE in existing:
        # Overwriting means replacing prompt tokens, never a model's config.json.
        try:
            _read_config(folder)
        except PromptTokensError as error:
            raise PromptTokensError(f"refusing to overwrite: {error}") from error


def tensor_file(path: str | os.PathLike[str]) -> Path:
    """The file that a loadable folder's embeddings are in, in either layout."""
    folder = Path(path)
    return weights_file(folder) if _has_peft_layout(folder) else folder / TENSOR_FILE


def _has_peft_layout(folder: Path) -> bool:
    """Raises PromptTokensError for a folder that has both layouts."""
    if not is_peft_checkpoint(folder):
        return False
    if (folder / TENSOR_FILE).exists():
        raise PromptTokensError(
            f"{str(folder)!r} holds prompt tokens twice, in {TENSOR_FILE} and as a "
            f"PEFT checkpoint ({ADAPTER_CONFIG}); move one of them to another folder"
        )
    return True


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in this format and version."""
    if not folder.exists():
        raise PromptTokensError(f"there is no prompt-token folder {str(folder)!r}")
    if not folder.is_dir():
        raise PromptTokensError(
            f"{str(folder)!r} is a file; expected the folder that holds {CONFIG_FILE} "
            f"and {TENSOR_FILE}"
        )
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = f"has no {CONFIG_FILE}" if any(folder.iterdir()) else "is empty"
        raise PromptTokensError(
            f"{str(folder)!r} {state}; expected a prompt-token folder with "
            f"{CONFIG_FILE} and {TENSOR_FILE}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PromptTokensError(f"{path} cannot be read as JSON: {error}") from error
    kind = config.get("format") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != FORMAT:
        what = "it says format " + repr(kind) if kind is not None else "no format"
        if isinstance(config, dict) and ("architectures" in config):
            what = "it describes a model; pass the folder of its prompt tokens"
        raise PromptTokensError(
            f"{path} is not the configuration of prompt tokens "
            f"(expected format {FORMAT!r}; {what})"
        )
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise PromptTokensError(
            f"{path} has format_version {version!r}; this release reads version "
            f"{FORMAT_VERSION}: upgrade vllm-ppd or write the prompt tokens again"
        )
    return config


def _check_keys(
    where: str, config: Mapping[str, object], keys: Collection[str]
) -> None:
    for key in config:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {list(keys)}"
            raise PromptTokensError(f"{where} has an unknown key {key!r}; {hint}")
    missing = [key for key in keys if key not in config]
    if missing:
        raise PromptTokensError(
            f"{where} lacks {', '.join(map(repr, missing))}; write the prompt tokens "
            "again, or restore the file"
        )


def _positive_int(where: str, config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or value < 1:
        raise PromptTokensError(
            f"{key} in {where} is {value!r}; expected a positive integer"
        )
    return value


def _read_embeddings(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise PromptTokensError(
            f"{str(path.parent)!r} has a {CONFIG_FILE} but no {TENSOR_FILE}; "
            "copy the whole folder"
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            tensor = tensors.get_tensor(TENSOR_NAME) if TENSOR_NAME in names else None
    except (SafetensorError, OSError) as error:
        raise PromptTokensError(
            f"{path} is not a readable safetensors file ({error}); copy it again"
        ) from error
    if tensor is None or len(names) != 1:
        raise PromptTokensError(
            f"{path} holds the tensors {names}; expected {TENSOR_NAME!r} alone"
        )
    return tensor
