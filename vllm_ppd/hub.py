"""Local folders of models and prompt tokens, given by path or Hugging Face hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vllm_ppd.files import FormatError

# One or two segments, as huggingface_hub accepts them.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# The last is where the authors' older checkpoints keep their embeddings.
_PROMPT_FILES = ("*.json", "*.safetensors", "adapter_model.bin")
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_OLD_MODEL_FILES = (*_MODEL_FILES, "pytorch_model*.bin")


def resolve_path(
    path_or_hub_id: str | os.PathLike[str],
    allow_patterns: Sequence[str] = _PROMPT_FILES,
) -> Path:
    """Return the local folder of `path_or_hub_id`, fetching it from the hub if need be.

    An existing folder always wins over a repository of the same name. Only files that
    match `allow_patterns` are fetched. Raises FormatError for a file, for a
    name that can be neither, and for every failure of the hub (offline, no such
    repository, no permission).
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(path_or_hub_id)
    if path.exists():
        raise FormatError(
            f"{name!r} is a file; expected a folder or a hub repository id "
            f"(did you mean its folder, {str(path.parent)!r}?)"
        )
    if not _HUB_ID.fullmatch(name):
        raise FormatError(
            f"there is no folder {name!r}, and it is no hub repository id "
            "(expected the form 'owner/name'); check the path"
        )
    # Here, because local folders do without.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=list(allow_patterns))
    # huggingface_hub raises many unrelated types (HTTP, OS, validation, offline).
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"there is no folder {name!r}, and the hub repository of that name "
            f"could not be fetched ({type(error).__name__}: {reason.rstrip('.')}); "
            "check the name and the network, or pass a local folder"
        ) from error
    return Path(folder)


def resolve_model_path(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """As `resolve_path`, for a model with its tokenizer and weights.

    Repositories without safetensors give their PyTorch weights.
    """
    folder = resolve_path(path_or_hub_id, allow_patterns=_MODEL_FILES)
    if Path(path_or_hub_id).expanduser().is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return resolve_path(path_or_hub_id, allow_patterns=_OLD_MODEL_FILES)
