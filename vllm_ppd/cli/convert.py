"""`vllm-ppd convert`: prompt tokens from the authors' layout into ours, and back.

The authors' checkpoints only name their base model, whereas a prompt-token folder holds
the fingerprint of its weights. Converting from the authors' layout therefore needs the
model itself.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vllm_ppd.hub import resolve_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "Folder or hub id of the prompt tokens to read, in either layout."
    add("source", metavar="SRC", help=text)
    add("destination", metavar="DST", help="Folder to write, in the other layout.")
    text = "Folder or hub id of the base model; required if SRC is in the authors' "
    text += "layout (for a hub id, only the JSON files are downloaded)."
    add("--model", help=text)
    add("--overwrite", action="store_true", help="Replace prompt tokens in DST.")


def convert(
    source: str,
    destination: str | os.PathLike[str],
    *,
    model: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the prompt tokens of `source` into `destination`, in the other layout.

    `source` and `model` are folders or hub ids. Into the authors' layout, `model` is
    checked against `source` and written as the base model's name. Embeddings become
    float32.

    Returns:
        what to tell the user, one sentence each.

    Raises:
        FormatError, PromptTokensError: input that cannot be read, does not fit the
            model, or would be overwritten.
    """
    # Here, because torch takes a second to import.
    from vllm_ppd.prompt_tokens.fingerprint import (
        BaseModelFingerprint,
        PromptTokensError,
    )
    from vllm_ppd.prompt_tokens.peft import is_peft_checkpoint
    from vllm_ppd.prompt_tokens.tokens import PromptTokens

    target = Path(destination).expanduser()
    folder = resolve_path(source)
    prompts = PromptTokens.load(folder)
    base = None
    if model is not None:
        is_folder = Path(model).expanduser().is_dir()
        # Without the weights, unless the hub's cache has them: they are large, and only
        # a part of one tensor would be read.
        model_folder = resolve_path(model, allow_patterns=("*.json",))
        base = BaseModelFingerprint.of_folder(
            model_folder,
            name=None if is_folder else model,
            revision=None if is_folder else model_folder.name,
        )
        prompts.check_against(base)
    notes = []
    if not is_peft_checkpoint(folder):
        prompts.save_peft(target, model or prompts.base.name, overwrite=overwrite)
        if prompts.num_ept > 1:
            notes.append("The authors' code decodes with one EPT only.")
    elif base is None:
        raise PromptTokensError(
            f"{source!r} names its base model {prompts.base.name!r} but holds no "
            "fingerprint of it; name the model's folder or hub id with --model"
        )
    else:
        prompts = PromptTokens(prompts.embeddings, base)
        prompts.save(target, overwrite=overwrite)
        if base.embedding_signs is None:
            notes.append(
                "The model's weights are not here, so the fingerprint holds only its "
                "sizes; convert with a folder that has its safetensors for the weights."
            )
    layout = "this project's" if is_peft_checkpoint(folder) else "the authors'"
    return [
        f"{prompts.num_prompt_tokens} prompt tokens of {prompts.num_ept} EPT for "
        f"{prompts.base.name} are in {destination}, in {layout} layout.",
        *notes,
        "Acceptance figures are not converted; measure them with vllm-ppd calibrate.",
    ]


def run(args: argparse.Namespace) -> int:
    """Convert as the flags say. Raises ValueError subclasses for unusable input."""
    lines = convert(
        args.source, args.destination, model=args.model, overwrite=args.overwrite
    )
    print("\n".join(lines))
    return 0
