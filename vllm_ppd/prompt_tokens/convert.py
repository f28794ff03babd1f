"""Prompt tokens between this project's layout and the authors'.

The authors' checkpoints name their base model and say nothing else about it, whereas
a prompt-token folder says which weights it belongs to. On the way in, the model itself
must therefore be at hand; on the way out, the name is what the authors' code loads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.peft import (
    ADAPTER_CONFIG,
    WEIGHTS_FILES,
    PeftCheckpoint,
    is_peft_checkpoint,
)
from vllm_ppd.prompt_tokens.tokens import CONFIG_FILE, TENSOR_FILE, PromptTokens

__all__ = ["Conversion", "ConversionError", "convert"]


class ConversionError(ValueError):
    """A conversion that was not done; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """What was written."""

    prompts: PromptTokens
    to_peft: bool
    """Whether into the authors' layout."""


def convert(
    source: str,
    destination: str | os.PathLike[str],
    *,
    model: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write the prompt tokens of `source` into `destination`, in the other layout.

    `source` and `model` are folders or hub ids. `model` is the base model: required
    into this project's layout, and otherwise checked against what `source` says and
    written as the name that the authors' code loads. Embeddings become float32.

    Raises ConversionError, PromptTokensError, FingerprintError or PathNotResolvedError
    for what cannot be read, does not fit the model, or is there already.
    """
    target = Path(destination).expanduser()
    folder = resolve_path(source)
    prompts = PromptTokens.load(folder)
    base = None if model is None else _fingerprint(model)
    if base is not None:
        prompts.check_against(base)
    if not is_peft_checkpoint(folder):
        _check_peft_destination(target, overwrite)
        checkpoint = PeftCheckpoint(prompts.embeddings, model or prompts.base.name)
        try:
            checkpoint.save(target)
        except OSError as error:
            raise ConversionError(
                f"the checkpoint cannot be written to {target}: {error}"
            ) from error
        return Conversion(prompts, to_peft=True)
    if base is None:
        raise ConversionError(
            f"{source!r} says of its base model only that it is "
            f"{prompts.base.name!r}, which does not tell whether another model is the "
            "same; name its folder or hub id with --model"
        )
    converted = PromptTokens(prompts.embeddings, base)
    converted.save(target, overwrite=overwrite)
    return Conversion(converted, to_peft=False)


def _fingerprint(model: str) -> BaseModelFingerprint:
    is_folder = Path(model).expanduser().is_dir()
    # Without the weights, unless they are in the hub's cache already: they are large,
    # and only a part of one tensor would be read.
    folder = resolve_path(model, allow_patterns=("*.json",))
    return BaseModelFingerprint.of_folder(
        folder,
        name=None if is_folder else model,
        revision=None if is_folder else folder.name,
    )


def _check_peft_destination(folder: Path, overwrite: bool) -> None:
    """Only a PEFT checkpoint is ever replaced, and only when asked to."""
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder} is a file; expected a folder to write into")
    for name in (CONFIG_FILE, TENSOR_FILE):
        if (folder / name).exists():
            raise ConversionError(
                f"{folder} already has {name}, which is not of a PEFT checkpoint; "
                "choose another folder"
            )
    existing = [n for n in (ADAPTER_CONFIG, *WEIGHTS_FILES) if (folder / n).exists()]
    if existing and not overwrite:
        raise ConversionError(
            f"{folder} already has {' and '.join(existing)}; choose another folder, or "
            "replace them with --overwrite"
        )
    if existing:
        # Never another kind of adapter, nor one that this would not read.
        PromptTokens.load(folder)
