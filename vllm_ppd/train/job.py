"""A training job from start to finish: read, check, train, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vllm_ppd.files import explained, write_json
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.tokens import PromptTokens, check_destination
from vllm_ppd.train.data import (
    DATA_FOLDER,
    TokenStream,
    load_tokenizer,
    read_stream,
    text_files,
)
from vllm_ppd.train.documents import sha256_of_files, versions
from vllm_ppd.train.model import (
    FrozenModel,
    default_learning_rate,
    initial_table,
    located_model,
)
from vllm_ppd.train.settings import INITS, RATE_STEPS, TrainingError, TrainSettings
from vllm_ppd.train.trainer import CHECKPOINT_FILE, Result, Schedule, Trainer

RECORD_FILE = "training.json"
RECORD_VERSION = 1
# Without a held-out file, this part of the training text, up to so many tokens.
_HELD_OUT_PART, _HELD_OUT_TOKENS = 0.05, 200_000


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """What `vllm-ppd train` is asked to do."""

    model: str
    """Folder or hub id of the frozen model."""
    data: Sequence[str]
    """Text files (vllm_ppd.train.documents) and data sets, by path or hub id
    (vllm_ppd.train.datasets)."""
    out: str
    """Folder for prompt tokens, record and checkpoint."""
    settings: TrainSettings
    held_out: Sequence[str] = ()
    """Text to measure accuracy on; without any, the end of the training text."""
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
        or folder, before the training if possible; Interrupted when asked to stop.
        """
        folder = Path(self.out)
        self.check_folder()
        accelerator = Accelerator(cpu=self.cpu)
        quiet = self.quiet or not accelerator.is_main_process
        base, model_folder = located_model(self.model, self.model_name)
        init: str | PromptTokens = self.settings.init
        if self.settings.init not in INITS:
            init = PromptTokens.load(resolve_path(self.settings.init))
            init.check_against(base)
        # Texts first: a missing file should not cost a model's loading.
        with accelerator.local_main_process_first():
            files, held_out_files = self._files(quiet)
        hashes = {
            "train": sha256_of_files(files),
            "held_out": sha256_of_files(held_out_files),
        }
        settings = self.settings
        tokenizer = load_tokenizer(model_folder)
        model = FrozenModel.load(
            model_folder,
            dtype=settings.dtype,
            device=accelerator.device,
            max_length=settings.length,
        )
        # Room for one window and for one held-out window.
        least = settings.length * (1 if held_out_files else 2)
        train_stream = self._read(files, tokenizer, least, quiet)
        if held_out_files:
            held_out = self._read(held_out_files, tokenizer, settings.length, quiet)
        else:
            part = int(train_stream.tokens.numel() * _HELD_OUT_PART)
            train_stream, held_out = train_stream.split(
                max(settings.length, min(part, _HELD_OUT_TOKENS))
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
        if settings.learning_rate is None:
            rate = default_learning_rate(model, train_stream)
            chosen: dict[str, Any] = {"learning_rate": rate, "rate_steps": RATE_STEPS}
            settings = dataclasses.replace(settings, **chosen)
            described |= chosen
        initial = initial_table(
            init,
            (settings.num_prompt_tokens, settings.num_ept),
            model,
            train_stream,
            settings.seed,
        )
        with explained(
            TrainingError, f"{folder} cannot be made", "choose another folder"
        ):
            folder.mkdir(parents=True, exist_ok=True)
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
            record = {
                "format_version": RECORD_VERSION,
                **run_id,
                "train_tokens": train_stream.tokens.numel(),
                "trainable_parameters": result.table.numel(),
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "positions": result.positions,
                "positions_per_second": round(result.positions_per_second, 1),
                "device": accelerator.device.type,
                "versions": versions(
                    "torch", "transformers", "accelerate", "safetensors"
                ),
                "held_out": result.history[-1],
                "history": result.history,
            }
            self._write(PromptTokens(result.table, base), record)
        return result

    def _files(self, quiet: bool) -> tuple[list[Path], list[Path]]:
        """Training and held-out files; data sets are copied beside the run."""

        def files(sources: Sequence[str], seed: int) -> list[Path]:
            return text_files(
                sources,
                Path(self.out) / DATA_FOLDER,
                max_tokens=self.settings.max_tokens,
                seed=seed,
                quiet=quiet,
            )

        # Held-out text does not follow the seed, so that runs can be compared.
        return files(self.data, self.settings.seed), files(self.held_out, 0)

    def check_folder(self) -> None:
        """Raise a ValueError subclass for an output folder that is in use."""
        folder = Path(self.out)
        check_destination(folder, overwrite=self.overwrite)
        checkpoint = folder / CHECKPOINT_FILE
        if checkpoint.exists() and not (self.resume or self.overwrite):
            raise TrainingError(
                f"{folder} has the checkpoint of an unfinished run; continue it with "
                "--resume, drop it with --overwrite, or choose another folder"
            )

    def _write(self, prompts: PromptTokens, record: dict[str, Any]) -> None:
        folder = Path(self.out)
        prompts.save(folder, overwrite=self.overwrite)
        what = f"{folder / RECORD_FILE} cannot be written"
        with explained(TrainingError, what, "make room and continue with --resume"):
            write_json(folder / RECORD_FILE, record)
            # Last: until all is written, the run can be continued.
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)

    def _read(
        self, files: Sequence[Path], tokenizer: Any, least_tokens: int, quiet: bool
    ) -> TokenStream:
        return read_stream(
            files,
            tokenizer,
            max_tokens=self.settings.max_tokens,
            least_tokens=least_tokens,
            seed=self.settings.seed,
            quiet=quiet,
        )
