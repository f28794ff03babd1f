"""A model with its texts, loaded once for many short trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoTokenizer

from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.data import TokenStream, read_stream
from vllm_ppd.train.documents import sha256_of_files
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.settings import TrainSettings
from vllm_ppd.train.table import default_learning_rate, initial_table
from vllm_ppd.train.trainer import CHECKPOINT_FILE, Result, Schedule, Trainer

__all__ = ["Texts", "Trained", "Workbench"]

# Judging is done after the run, outside of its clock: this is the least there can be.
_SCHEDULE = Schedule(evaluations=1, evaluation_sequences=1)


@dataclass(frozen=True)
class Texts:
    """What a workbench reads."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    max_tokens: int
    """Of training text; more is left unread."""


@dataclass(frozen=True)
class Trained:
    """The outcome of a training and what it took."""

    prompts: PromptTokens
    steps: int
    seconds: float
    tokens: int
    """Of text gone through, repetitions counted."""
    positions: int
    """Supervised predictions: insertion points times prompt tokens."""
    positions_per_second: float
    learning_rate: float

    def cost(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
            "tokens": self.tokens,
            "positions": self.positions,
            "positions_per_second": round(self.positions_per_second, 1),
            "learning_rate": self.learning_rate,
        }


@dataclass(frozen=True, eq=False)
class Workbench:
    """Loaded model and texts."""

    model: FrozenModel
    base: BaseModelFingerprint
    text: TokenStream
    held_out: TokenStream
    learning_rate: float
    """The trainer's default for this model and text."""
    data_sha256: dict[str, Any]

    @classmethod
    def load(cls, model: str, texts: Texts, length: int, quiet: bool) -> Workbench:
        """Read a model folder and the texts, for windows of `length` tokens.

        Raises ValueError subclasses that name what is wrong with model or texts.
        """
        hashes = {
            "train": sha256_of_files(texts.train),
            "held_out": sha256_of_files(texts.held_out),
        }
        base = BaseModelFingerprint.of_folder(model)
        frozen = FrozenModel.load(model, device=Accelerator().device, max_length=length)
        tokenizer = AutoTokenizer.from_pretrained(model)
        text = read_stream(
            texts.train,
            tokenizer,
            max_tokens=texts.max_tokens,
            least_tokens=length,
            quiet=quiet,
        )
        held_out = read_stream(
            texts.held_out,
            tokenizer,
            max_tokens=texts.max_tokens,
            least_tokens=length,
        )
        rate = default_learning_rate(frozen, text)
        return cls(frozen, base, text, held_out, rate, hashes)

    def train(
        self,
        settings: TrainSettings,
        folder: Path,
        *,
        identity: dict[str, Any],
        initial: PromptTokens | None = None,
        text_tokens: int | None = None,
    ) -> Trained:
        """One training, continued if `folder` has the checkpoint of `identity`.

        `initial` are prompt tokens to start from instead of what `settings.init` says;
        `text_tokens` limits the text. Raises Interrupted when asked to stop, ValueError
        subclasses for settings that do not fit.
        """
        text = self.text
        if text_tokens is not None and text_tokens < text.tokens.numel():
            text, _ = text.split(text.tokens.numel() - text_tokens)
        table = initial_table(
            initial or settings.init,
            (settings.num_prompt_tokens, settings.num_ept),
            self.model,
            text,
            settings.seed,
        )
        folder.mkdir(parents=True, exist_ok=True)
        result = Trainer(
            model=self.model,
            train_stream=text,
            held_out=self.held_out,
            settings=settings,
            accelerator=Accelerator(),
            folder=folder,
            run_id=identity,
            schedule=_SCHEDULE,
            quiet=True,
        ).run(table, resume=True)
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return self._trained(settings, result)

    def _trained(self, settings: TrainSettings, result: Result) -> Trained:
        assert settings.learning_rate is not None
        return Trained(
            prompts=PromptTokens(result.table, self.base),
            steps=result.steps,
            seconds=result.seconds,
            tokens=round(result.steps * settings.text_tokens_per_step),
            positions=result.positions,
            positions_per_second=result.positions_per_second,
            learning_rate=settings.learning_rate,
        )
