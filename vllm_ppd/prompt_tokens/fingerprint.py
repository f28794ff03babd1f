"""The identity of a base model, so that prompt tokens are not used with another one.

Prompt tokens are input embeddings of one model. With another model they would only
lower the acceptance rate, without any error. The fingerprint is cheap (a few hundred
rows of one tensor) and needs no model code.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_ppd.files import read_object

# How names of the input embedding end across Hugging Face model code.
_EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_MAX_HASHED_ROWS = 256
_EXPECTED = "expected a Hugging Face model folder"


class PromptTokensError(ValueError):
    """Prompt tokens, or a base model, that cannot be read, written or used together."""


@dataclass(frozen=True)
class BaseModelFingerprint:
    """Identity of a base model.

    Raises PromptTokensError when a field has the wrong type or range.
    """

    name: str
    """Hub id or folder name, for messages; never compared."""
    revision: str | None
    """Hub commit, or None when unknown; never compared."""
    architecture: str | None
    """First entry of `architectures` in config.json, as "LlamaForCausalLM"; None when
    unknown, as in the authors' checkpoints."""
    hidden_size: int
    """Width of an input embedding."""
    vocab_size: int | None
    """Rows of the input embedding as config.json has it; None when unknown."""
    embedding_sha256: str | None
    """See `embedding_sha256`; None when the folder has no readable safetensors."""

    def __post_init__(self) -> None:
        for field, kind, pattern, expected in (
            ("name", str, "(?s).+", "a name"),
            ("architecture", str, "(?s).+", "a name or null"),
            ("hidden_size", int, "[1-9][0-9]*", "a positive integer"),
            ("vocab_size", int, "[1-9][0-9]*", "a positive integer or null"),
            ("revision", str, "(?s).+", "a name or null"),
            ("embedding_sha256", str, "[0-9a-f]{64}", "64 hexadecimal digits or null"),
        ):
            value = getattr(self, field)
            fits = isinstance(value, kind) and re.fullmatch(pattern, str(value))
            if not (fits or (value is None and "null" in expected)):
                raise PromptTokensError(
                    f"{field} of the base model is {value!r}; expected {expected}"
                )

    @classmethod
    def of_folder(
        cls,
        path: str | os.PathLike[str],
        name: str | None = None,
        revision: str | None = None,
    ) -> BaseModelFingerprint:
        """Fingerprint of a local Hugging Face model folder.

        Reads config.json and, through safetensors, up to 256 rows of the input
        embedding. `name` defaults to the folder's own name. A folder
        without safetensors gets `embedding_sha256=None`. Raises FormatError or
        PromptTokensError for a missing folder, an unusable config.json or a corrupt
        safetensors file.
        """
        folder = Path(path)
        config = _read_config(folder)
        text, nested = config, config.get("text_config")
        # Multimodal checkpoints keep the language model's sizes one level down.
        if "hidden_size" not in config and isinstance(nested, dict):
            text = nested
        hidden_size = _first_int(folder, text, ("hidden_size", "n_embd", "d_model"))
        vocab_size = _first_int(folder, text, ("vocab_size",))
        names = config.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else None
        if not (isinstance(architecture, str) and architecture):
            raise PromptTokensError(
                f"{folder / 'config.json'} names no architecture "
                f"(architectures is {names!r}); is it a model's folder?"
            )
        return cls(
            name=name or folder.resolve().name,
            revision=revision,
            architecture=architecture,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            embedding_sha256=_hash_embedding(folder, hidden_size, vocab_size),
        )

    def differences(self, other: BaseModelFingerprint) -> list[str]:
        """One phrase for each property in which `other` differs from this model.

        Name and revision may differ between equal copies, so they are not compared.
        The other properties are compared if both sides have them.
        """
        phrases = [
            f"{label} {getattr(other, field)} instead of {getattr(self, field)}"
            for field, label in (
                ("hidden_size", "hidden size"),
                ("vocab_size", "vocabulary size"),
                ("architecture", "architecture"),
            )
            if getattr(other, field) != getattr(self, field)
            and None not in (getattr(other, field), getattr(self, field))
        ]
        hashes = (self.embedding_sha256, other.embedding_sha256)
        if None not in hashes and hashes[0] != hashes[1]:
            phrases.append(
                f"embedding hash {str(other.embedding_sha256)[:12]} instead of "
                f"{str(self.embedding_sha256)[:12]} (other weights)"
            )
        return phrases


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PromptTokensError(
            f"there is no model folder {str(folder)!r}; check the path"
        )
    path = folder / "config.json"
    if not path.exists():
        raise PromptTokensError(f"{str(folder)!r} has no config.json; {_EXPECTED}")
    return read_object(path, "the model's configuration", _EXPECTED)


def _first_int(folder: Path, config: dict[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    raise PromptTokensError(
        f"{folder / 'config.json'} has no positive {' or '.join(keys)}; "
        "is it the folder of a language model?"
    )


def _hash_embedding(folder: Path, hidden_size: int, vocab_size: int) -> str | None:
    """sha256 over up to 256 evenly spaced rows of the input embedding.

    Rows are rounded to bfloat16 and hashed as little-endian float32, so that copies of
    one checkpoint in float32 and bfloat16 agree.
    """
    samples: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    if not name.endswith(_EMBEDDING_NAMES):
                        continue
                    view = tensors.get_slice(name)
                    shape = view.get_shape()
                    # A quantised embedding cannot be compared with a plain one.
                    plain = view.get_dtype() in ("F64", "F32", "F16", "BF16")
                    if shape[1:] != [hidden_size] or not plain:
                        continue
                    rows = min(vocab_size, shape[0])
                    count = min(_MAX_HASHED_ROWS, rows)
                    picked = [i * rows // count for i in range(count)]
                    samples[name] = torch.cat([view[i : i + 1] for i in picked])
        except (SafetensorError, OSError) as error:
            raise PromptTokensError(
                f"{path} is not a readable safetensors file ({error}); "
                "download the model again"
            ) from error
    if not samples:
        return None
    values = samples[min(samples)].to(torch.bfloat16).float().numpy().astype("<f4")
    return hashlib.sha256(values.tobytes()).hexdigest()
