"""Everything about a training run that changes its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "DTYPES",
    "INITS",
    "RATE_STEPS",
    "TOKENS_PER_UPDATE",
    "Distillation",
    "LossKind",
    "TrainSettings",
    "TrainingError",
]

LossKind = Literal["kl", "labels"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
INITS = ("text", "vocabulary")
TOKENS_PER_UPDATE = 32
# The `rate_steps` of the default learning rate.
RATE_STEPS = 1200
_OPTIONAL_COUNTS = ("steps", "patience", "rate_steps")


class TrainingError(ValueError):
    """Settings, text, model or files that training or calibration cannot use."""


@dataclass(frozen=True)
class Distillation:
    """Training text that the frozen model writes itself, going on from the data.

    Raises TrainingError for a value out of range.
    """

    continuations: int
    """How many; each, with its prompt, is as long as a training sequence."""
    prompt_length: int = 64
    """Tokens of the data that each goes on from."""
    temperature: float = 1.0
    """0 is greedy."""
    batch_size: int = 32
    """Continuations written at once."""

    def __post_init__(self) -> None:
        for name in ("continuations", "prompt_length", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise TrainingError(
                    f"{name} of the self-distillation is {value!r}; expected a whole "
                    "number of at least 1"
                )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise TrainingError(
                f"temperature of the self-distillation is {self.temperature}; expected "
                "0 (greedy) or above"
            )


@dataclass(frozen=True)
class TrainSettings:
    """Defaults follow the paper's training where it gives a value.

    Raises TrainingError for a value out of range.
    """

    steps: int | None = None
    """Optimiser steps; either this or `minutes`."""
    minutes: float | None = None
    """Wall-clock budget of the training loop, start-up not counted."""
    patience: int | None = None
    """Held-out evaluations without a better one after which to stop, keeping the best
    table; None goes on to the end and keeps the last."""
    num_prompt_tokens: int = 3
    """m: tokens predicted beyond the next one."""
    num_ept: int = 1
    """e: ensemble members per prompt token."""
    length: int = 256
    """Tokens per training sequence."""
    batch_size: int = 1
    """Sequences per pass and process. There are few parameters to train, and the many
    insertion points of one sequence tell enough about them: more and smaller steps
    get further (benchmarks/train_ablation.py)."""
    points: int = 8
    """Insertion points per sequence and update."""
    updates: int = None  # type: ignore[assignment]
    """Optimiser steps per pass of a batch through the frozen model, each with insertion
    points of its own; None is one for every 32 tokens of `length`: the longer a pass
    takes, the more it should serve."""
    learning_rate: float | None = None
    """Peak of AdamW's cosine schedule (no warm-up, no weight decay); None is the
    `default_learning_rate` of the model, with its `rate_steps`. The paper has 0.01."""
    rate_steps: int | None = None
    """Steps of a run that takes the whole `learning_rate`: shorter runs take their part
    of it, as they have no time to settle what large steps stir up. None takes it
    whole."""
    alpha: float = 0.8
    """Distance i counts alpha^(i-1)."""
    loss: LossKind = "kl"
    """kl (to the frozen model) or labels (cross-entropy with the text)."""
    init: str = "text"
    """text or vocabulary (embeddings of ordinary tokens), or a prompt-token folder."""
    dtype: str = "auto"
    """Number format of the frozen model; auto is the checkpoint's own."""
    seed: int = 0
    max_tokens: int = 20_000_000
    """Training text beyond this many tokens is left unread."""
    distillation: Distillation | None = None
    """Train on text that the model writes itself; None is the data as they are."""

    def __post_init__(self) -> None:
        if self.updates is None:
            updates = max(1, self.length // TOKENS_PER_UPDATE)
            object.__setattr__(self, "updates", updates)  # frozen, but not yet made
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError(
                f"steps is {self.steps} and minutes is {self.minutes}; "
                "expected exactly one of the two"
            )
        for name in (
            "num_prompt_tokens",
            "num_ept",
            "length",
            "batch_size",
            "points",
            "updates",
            "max_tokens",
            *(n for n in _OPTIONAL_COUNTS if getattr(self, n) is not None),
        ):
            self._check(name, type(getattr(self, name)) is int, 1, "a whole number")
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            if value is not None:
                self._check(name, math.isfinite(value), None, "a number")
        if not 0 < self.alpha <= 1:
            raise TrainingError(f"alpha is {self.alpha}; expected above 0, at most 1")
        for name, choices in (
            ("loss", get_args(LossKind)),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise TrainingError(
                    f"{name} is {getattr(self, name)!r}; "
                    f"expected one of {', '.join(map(str, choices))}"
                )
        if self.length <= self.num_prompt_tokens:
            raise TrainingError(
                f"length is {self.length}, too short to insert "
                f"{self.num_prompt_tokens} prompt tokens; "
                f"expected at least {self.num_prompt_tokens + 1}"
            )
        if self.distillation is not None:
            # The model's first token, and m more after it, must find room.
            longest = self.length - self.num_prompt_tokens - 1
            if self.distillation.prompt_length > longest:
                raise TrainingError(
                    f"prompt_length of the self-distillation is "
                    f"{self.distillation.prompt_length}, which leaves no room in "
                    f"sequences of {self.length} tokens; expected at most {longest}"
                )

    def _check(self, name: str, typed: bool, least: int | None, kind: str) -> None:
        value = getattr(self, name)
        in_range = typed and (value >= least if least is not None else value > 0)
        if not in_range:
            bound = f"of at least {least}" if least is not None else "above 0"
            raise TrainingError(f"{name} is {value!r}; expected {kind} {bound}")

    @property
    def text_tokens_per_step(self) -> float:
        """Tokens of text that a step of one process goes through, on average."""
        return self.batch_size * self.length / self.updates

    def learning_rate_at(self, progress: float, steps: float) -> float:
        """Cosine from the peak at progress 0 to zero at 1 and beyond.

        steps: of the whole run, or what it will come to at its present speed.
        Raises TrainingError while `learning_rate` is None.
        """
        if self.learning_rate is None:
            raise TrainingError("learning_rate is None; expected it resolved by now")
        part = min(1.0, steps / self.rate_steps) if self.rate_steps else 1.0
        done = min(max(progress, 0.0), 1.0)
        return self.learning_rate * part * 0.5 * (1.0 + math.cos(math.pi * done))
