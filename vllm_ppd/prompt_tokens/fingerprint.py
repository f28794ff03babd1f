"""The identity of a base model, so that prompt tokens are not used with another one.

Prompt tokens are input embeddings of one model. With another model they would only
lower the acceptance rate, without any error. The fingerprint is cheap (a few rows of
one tensor) and needs no model code. Copies that were quantised or trained further keep
nearly all signs of their embedding; with another tokenizer half of them differ.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
_ROWS = _COLUMNS = 64  # of the embedding
# Share of differing signs from which the weights have nothing to do with each other.
_UNRELATED = 0.25
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
    embedding_signs: str | None
    """Signs of 64 evenly spaced rows of the input embedding, of the first 64 columns
    each, packed into hexadecimal digits; None when the folder has no safetensors."""

    def __post_init__(self) -> None:
        for field, kind, pattern, expected in (
            ("name", str, "(?s).+", "a name"),
            ("architecture", str, "(?s).+", "a name or null"),
            ("hidden_size", int, "[1-9][0-9]*", "a positive integer"),
            ("vocab_size", int, "[1-9][0-9]*", "a positive integer or null"),
            ("revision", str, "(?s).+", "a name or null"),
            ("embedding_signs", str, "[0-9a-f]+", "hexadecimal digits or null"),
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

        Reads config.json and, through safetensors, up to 64 rows of the input
        embedding. `name` defaults to the folder's own name. A folder
        without safetensors gets `embedding_signs=None`. Raises FormatError or
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
            embedding_signs=_embedding_signs(folder, hidden_size, vocab_size),
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
        drift = self.drift(other)
        if drift is not None and drift >= _UNRELATED:
            phrases.append(
                f"another embedding ({drift:.0%} of its signs differ: another "
                "tokenizer, or weights that were not made from the same ones)"
            )
        return phrases

    def drift(self, other: BaseModelFingerprint) -> float | None:
        """Share of the embedding's signs that differ: 0 for a copy, some hundredths
        after quantisation or further training; None where they cannot be compared."""
        ours, theirs = self.embedding_signs, other.embedding_signs
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        return (int(ours, 16) ^ int(theirs, 16)).bit_count() / (4 * len(ours))


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


def _embedding_signs(folder: Path, hidden_size: int, vocab_size: int) -> str | None:
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
                    count = min(_ROWS, rows)
                    picked = [i * rows // count for i in range(count)]
                    samples[name] = torch.cat(
                        [view[i : i + 1, :_COLUMNS] for i in picked]
                    )
        except (SafetensorError, OSError) as error:
            raise PromptTokensError(
                f"{path} is not a readable safetensors file ({error}); "
                "download the model again"
            ) from error
    if not samples:
        return None
    return np.packbits((samples[min(samples)] < 0).numpy()).tobytes().hex()
