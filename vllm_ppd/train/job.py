"""A training job from start to finish: read, check, train, write."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoTokenizer

import vllm_ppd
from vllm_ppd.atomic import write_json
from vllm_ppd.fingerprint import BaseModelFingerprint
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompts import PromptTokens, check_destination
from vllm_ppd.train.checkpoint import CheckpointError
from vllm_ppd.train.data import TokenStream, read_stream
from vllm_ppd.train.documents import sha256_of_files
from vllm_ppd.train.model import FrozenModel, ModelError
from vllm_ppd.train.settings import INITS, TrainSettings
from vllm_ppd.train.table import default_learning_rate, initial_table
from vllm_ppd.train.trainer import CHECKPOINT_FILE, Result, Schedule, Trainer

__all__ = ["RECORD_FILE", "OutputError", "TrainJob"]

RECORD_FILE = "training.json"
RECORD_VERSION = 1
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# Without a held-out file, this part of the training text, up to so many tokens.
_HELD_OUT_PART, _HELD_OUT_TOKENS = 0.05, 200_000


class OutputError(ValueError):
    """A folder that cannot be written."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """What `vllm-ppd train` is asked to do."""

    model: str
    """Folder or hub id of the frozen model."""
    data: Sequence[str]
    """Text files, see vllm_ppd.train.documents."""
    out: str
    """Folder for prompt tokens, record and checkpoint."""
    settings: TrainSettings
    held_out: Sequence[str] = ()
    """Text files to measure accuracy on; without any, the end of the training text."""
    model_name: str | None = None
    """Name of the model in the record; its hub id or folder name if None."""
    resume: bool = False
    """Continue from the folder's checkpoint if there is one."""
    overwrite: bool = False
    """Replace prompt tokens, or drop a checkpoint, that the folder already has."""
    cpu: bool = False
    """Use no accelerator even if there is one."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    quiet: bool = False

    def run(self) -> Result:
        """Train, and write prompt tokens and training.json into `out`.

        Raises ValueError subclasses that name what is wrong with model, data, settings
        or folder, before any training where they can be known; Interrupted when asked
        to stop.
        """
        folder = Path(self.out)
        self._check_folder(folder)
        accelerator = Accelerator(cpu=self.cpu)
        quiet = self.quiet or not accelerator.is_main_process
        base, model_folder = self._base_model()
        init = self._init(base)
        # The files' hashes first: a missing file should not cost a model's loading.
        hashes = {
            "train": sha256_of_files(self.data),
            "held_out": sha256_of_files(self.held_out),
        }
        settings = self.settings
        model = FrozenModel.load(
            model_folder,
            dtype=settings.dtype,
            device=accelerator.device,
            max_length=settings.length,
        )
        train_stream, held_out = self._streams(model_folder, quiet)
        if settings.learning_rate is None:
            rate = default_learning_rate(model, train_stream)
            settings = dataclasses.replace(settings, learning_rate=rate)
        initial = initial_table(
            init,
            (settings.num_prompt_tokens, settings.num_ept),
            model,
            train_stream,
            settings.seed,
        )
        described = dataclasses.asdict(settings)
        if settings.init not in INITS:
            described["init"] = Path(settings.init).name
        run_id = {
            "settings": described,
            "base_model": dataclasses.asdict(base),
            "data_sha256": hashes,
            "processes": accelerator.num_processes,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made: {error.strerror}; choose another folder"
            ) from error
        trainer = Trainer(
            model=model,
            train_stream=train_stream,
            held_out=held_out,
            settings=settings,
            accelerator=accelerator,
            folder=folder,
            run_id=run_id,
            schedule=self.schedule,
            quiet=quiet,
        )
        result = trainer.run(initial, resume=self.resume)
        if accelerator.is_main_process:
            tokens = train_stream.tokens.numel()
            record = self._record(run_id, result, tokens, accelerator)
            self._write(PromptTokens(result.table, base), record)
        return result

    def _check_folder(self, folder: Path) -> None:
        check_destination(folder, overwrite=self.overwrite)
        checkpoint = folder / CHECKPOINT_FILE
        if checkpoint.exists() and not (self.resume or self.overwrite):
            raise CheckpointError(
                f"{folder} has the checkpoint of an unfinished run; continue it with "
                "--resume, drop it with --overwrite, or choose another folder"
            )

    def _write(self, prompts: PromptTokens, record: dict[str, Any]) -> None:
        folder = Path(self.out)
        prompts.save(folder, overwrite=self.overwrite)
        try:
            write_json(folder / RECORD_FILE, record)
            # Last: until all is written, the run can be continued.
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder / RECORD_FILE} cannot be written: {error.strerror}"
            ) from error

    def _base_model(self) -> tuple[BaseModelFingerprint, Path]:
        is_folder = os.path.isdir(self.model)
        folder = resolve_path(self.model, allow_patterns=_MODEL_FILES)
        name = self.model_name or (None if is_folder else self.model)
        # A hub snapshot's folder is named after its commit.
        revision = None if is_folder else folder.name
        base = BaseModelFingerprint.of_folder(folder, name=name, revision=revision)
        return base, folder

    def _init(self, base: BaseModelFingerprint) -> str | PromptTokens:
        if self.settings.init in INITS:
            return self.settings.init
        prompts = PromptTokens.load(resolve_path(self.settings.init))
        prompts.check_against(base)
        return prompts

    def _streams(self, model: Path, quiet: bool) -> tuple[TokenStream, TokenStream]:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{str(model)!r} has no usable tokenizer: {reason}") from (
                error
            )
        settings = self.settings
        # Room for one window and for one held-out window.
        least = settings.length if self.held_out else 2 * settings.length
        train = read_stream(
            self.data,
            tokenizer,
            max_tokens=settings.max_tokens,
            least_tokens=least,
            seed=settings.seed,
            quiet=quiet,
        )
        if not self.held_out:
            part = int(train.tokens.numel() * _HELD_OUT_PART)
            return train.split(max(settings.length, min(part, _HELD_OUT_TOKENS)))
        held_out = read_stream(
            self.held_out,
            tokenizer,
            max_tokens=settings.max_tokens,
            least_tokens=settings.length,
            quiet=quiet,
        )
        return train, held_out

    def _record(
        self,
        run_id: dict[str, Any],
        result: Result,
        tokens: int,
        accelerator: Accelerator,
    ) -> dict[str, Any]:
        versions = {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "accelerate", "safetensors")
        }
        versions |= {"vllm_ppd": vllm_ppd.__version__}
        versions |= {"python": platform.python_version()}
        return {
            "format_version": RECORD_VERSION,
            **run_id,
            "train_tokens": tokens,
            "trainable_parameters": result.table.numel(),
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "positions": result.positions,
            "positions_per_second": round(result.positions_per_second, 1),
            "device": accelerator.device.type,
            "versions": versions,
            "held_out": result.history[-1] if result.history else None,
            "history": result.history,
        }
