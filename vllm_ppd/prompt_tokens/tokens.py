"""Trained prompt tokens, on disk and in memory.

A prompt-token folder holds `config.json`
`{"format": "ppd_prompt_tokens", "format_version": 1, "num_prompt_tokens": m,
"num_ept": e, "hidden_size": h, "base_model": {...}}` and `prompt_tokens.safetensors`
with one tensor `embeddings` [m, e, h] of any floating dtype. Other files beside them
(acceptance.json, trees.json, training.json) have readers of their own. Folders in the
authors' layout (vllm_ppd.prompt_tokens.peft) are read as well.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from vllm_ppd.files import (
    FormatError,
    check_keys,
    explained,
    read_json,
    write_bytes,
    write_json,
)
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint, PromptTokensError
from vllm_ppd.prompt_tokens.peft import (
    ADAPTER_CONFIG,
    WEIGHTS_FILES,
    is_peft_checkpoint,
    read_checkpoint,
    weights_file,
    write_checkpoint,
)

FORMAT = "ppd_prompt_tokens"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "prompt_tokens.safetensors"
TENSOR_NAME = "embeddings"

# What a clone of the repository has.
TRAINED = Path(__file__).resolve().parents[2] / "trained_prompts"

_SIZES = ("num_prompt_tokens", "num_ept", "hidden_size")
_BASE_KEYS = tuple(f.name for f in dataclasses.fields(BaseModelFingerprint))
_REMEDY = "pass a folder that vllm-ppd train or convert wrote, or restore the file"


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """m prompt tokens of e ensemble members (EPT) each, and the model they belong to.

    Raises PromptTokensError unless `embeddings` is a finite floating tensor [m, e,
    hidden] whose width is the base model's; it is stored as contiguous float32.
    """

    embeddings: torch.Tensor
    """float32 [m, e, hidden]; EPT j of prompt token i is `embeddings[i - 1, j]`."""
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
        """m: how many tokens beyond the next one are predicted."""
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

    def check_against(self, fingerprint: BaseModelFingerprint) -> str | None:
        """Raise PromptTokensError, naming every mismatch, unless made for that model.

        Returns a warning if the model's weights were quantised or trained further
        since. A property that either side lacks is not compared: the authors'
        checkpoints have the hidden size alone.
        """
        differences = self.base.differences(fingerprint)
        if differences:
            raise PromptTokensError(
                f"these prompt tokens were trained for {self.base.name!r}, but the "
                f"model {fingerprint.name!r} has {', '.join(differences)}; use prompt "
                "tokens trained for it, or train some with vllm-ppd train"
            )
        if not (drift := self.base.drift(fingerprint)):
            return None
        return (
            f"these prompt tokens were trained for other weights of {self.base.name!r} "
            f"({drift:.1%} of the embedding's signs differ): output stays the same, "
            "but fewer drafts may be accepted than with some trained for these weights"
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PromptTokens:
        """Read a prompt-token folder, or one in the authors' layout, strictly.

        The latter has only a name of its base model. Raises FormatError or
        PromptTokensError, one sentence with the path, for anything missing, unknown,
        mistyped, corrupt or inconsistent.
        """
        folder = Path(path)
        if _has_peft_layout(folder):
            embeddings, name = read_checkpoint(folder)
            base = BaseModelFingerprint(
                name=name or "unknown",
                revision=None,
                architecture=None,
                hidden_size=embeddings.shape[2],
                vocab_size=None,
                embedding_signs=None,
            )
        else:
            sizes, base = _read_config(folder)
            embeddings = _read_embeddings(folder / TENSOR_FILE)
            if tuple(embeddings.shape) != sizes:
                raise PromptTokensError(
                    f"{folder / TENSOR_FILE} holds embeddings "
                    f"{list(embeddings.shape)}, but {folder / CONFIG_FILE} says "
                    f"{list(sizes)} ({', '.join(_SIZES)}); the two files do not belong "
                    "together"
                )
        try:
            return cls(embeddings, base)
        except PromptTokensError as error:
            raise PromptTokensError(f"{folder}: {error}; {_REMEDY}") from error

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
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / TENSOR_FILE, content)
            write_json(folder / CONFIG_FILE, config)

    def save_peft(
        self, path: str | os.PathLike[str], base_model: str, *, overwrite: bool = False
    ) -> None:
        """Write a folder in the authors' layout, which names `base_model`.

        Raises PromptTokensError for a folder that holds anything but prompt tokens in
        that layout, for one that holds those unless `overwrite`, and when it cannot be
        written.
        """
        folder = Path(path)
        _require_folder(folder)
        if _own_files(folder):
            raise PromptTokensError(
                f"{folder} already has {' and '.join(_own_files(folder))}, which no "
                "PEFT checkpoint has; choose another folder"
            )
        existing = [
            name
            for name in (ADAPTER_CONFIG, *WEIGHTS_FILES)
            if (folder / name).exists()
        ]
        if existing and not overwrite:
            raise PromptTokensError(
                f"{folder} already has {' and '.join(existing)}; choose another "
                "folder, or replace them with --overwrite"
            )
        if existing:
            # Never another kind of adapter, nor one that this would not read.
            PromptTokens.load(folder)
        with _writing(folder):
            write_checkpoint(folder, self.embeddings, base_model)


def trained_for(model: BaseModelFingerprint) -> Path | None:
    """The folder in `TRAINED` whose prompt tokens belong to a model, by its weights;
    of several, the one trained for the nearest weights."""
    folders: dict[Path, float] = {}
    for file in sorted(TRAINED.glob(f"*/{CONFIG_FILE}")):
        _, base = _read_config(file.parent)
        drift = base.drift(model)
        if drift is not None and not base.differences(model):
            folders[file.parent] = drift
    return min(folders, key=lambda folder: folders[folder], default=None)


def check_destination(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise PromptTokensError if `PromptTokens.save` would refuse the folder."""
    folder = Path(path)
    _require_folder(folder)
    if is_peft_checkpoint(folder):
        raise PromptTokensError(
            f"{folder} is a PEFT checkpoint (it has {ADAPTER_CONFIG}); choose another "
            "folder"
        )
    existing = _own_files(folder)
    if not existing:
        return
    if not overwrite:
        raise PromptTokensError(
            f"{folder} already has {' and '.join(existing)}; "
            "choose another folder, or allow overwriting"
        )
    if CONFIG_FILE in existing:
        # --overwrite may replace prompt tokens, but never a model's config.json.
        try:
            _read_config(folder)
        except (FormatError, PromptTokensError) as error:
            raise PromptTokensError(f"refusing to overwrite: {error}") from error


def tensor_file(path: str | os.PathLike[str]) -> Path:
    """The file that a loadable folder's embeddings are in, in either layout."""
    folder = Path(path)
    return weights_file(folder) if _has_peft_layout(folder) else folder / TENSOR_FILE


def _writing(folder: Path) -> AbstractContextManager[None]:
    what = f"prompt tokens cannot be written to {folder}"
    return explained(PromptTokensError, what, "choose another folder")


def _require_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise PromptTokensError(f"{folder} is a file; expected a folder to write into")


def _own_files(folder: Path) -> list[str]:
    return [name for name in (CONFIG_FILE, TENSOR_FILE) if (folder / name).exists()]


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


def _read_config(folder: Path) -> tuple[tuple[int, ...], BaseModelFingerprint]:
    """(m, e, hidden) and the base model, as config.json has them."""
    if not folder.exists():
        raise PromptTokensError(
            f"there is no prompt-token folder {str(folder)!r}; {_REMEDY}"
        )
    if not folder.is_dir():
        raise PromptTokensError(
            f"{str(folder)!r} is a file; expected the folder that holds {CONFIG_FILE} "
            f"and {TENSOR_FILE}"
        )
    path = folder / CONFIG_FILE
    if not path.exists():
        state = f"has no {CONFIG_FILE}" if any(folder.iterdir()) else "is empty"
        raise PromptTokensError(
            f"{str(folder)!r} {state}; expected a prompt-token folder with "
            f"{CONFIG_FILE} and {TENSOR_FILE}"
        )
    config = read_json(
        path,
        kind="the configuration of prompt tokens",
        format=FORMAT,
        version=FORMAT_VERSION,
        keys=(*_SIZES, "base_model"),
        remedy=_REMEDY,
    )
    base = config["base_model"]
    try:
        if not isinstance(base, dict):
            raise PromptTokensError(f"base_model is {base!r}; expected an object")
        check_keys(base, _BASE_KEYS)
        for key in ("architecture", "vocab_size"):
            if base[key] is None:
                raise PromptTokensError(f"{key} of the base model is null")
        return tuple(config[key] for key in _SIZES), BaseModelFingerprint(**base)
    except ValueError as error:
        raise PromptTokensError(f"{path}: {error}; {_REMEDY}") from error


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
