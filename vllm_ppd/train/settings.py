"""Everything about a training run that changes its result."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

LossKind = Literal["kl", "labels"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
INITS = ("text", "vocabulary")
TOKENS_PER_UPDATE = 32
# The `rate_steps` of the default learning rate.
RATE_STEPS = 1200
_COUNTS = (
    *("num_prompt_tokens", "num_ept", "length", "batch_size"),
    *("points", "updates", "max_tokens"),
)
_OPTIONAL_COUNTS = ("steps", "rate_steps")


class TrainingError(ValueError):
    """Settings, text, model or files that training or calibration cannot use."""


def cpu_dtype(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> str:
    """The faster data type on this CPU: "bfloat16" or "float32".

    A CPU without bfloat16 instructions computes it through a fallback that is several
    times slower than float32.
    """
    try:
        flags = re.findall(r"^flags\s*:(.*)$", Path(cpuinfo).read_text(), re.M)
    except OSError:
        return "float32"
    words = set(" ".join(flags).split())
    return "bfloat16" if words & {"avx512_bf16", "amx_bf16"} else "float32"


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Raise TrainingError for a field that is no whole number of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if type(value) is not int or value < least:
            raise TrainingError(
                f"{name} is {value!r}; expected a whole number of at least {least}"
            )


def check_temperature(value: float) -> None:
    """Raise TrainingError for what cannot be a sampling temperature."""
    if not (math.isfinite(value) and value >= 0):
        raise TrainingError(f"temperature is {value}; expected 0 (greedy) or above")


def check_seed(value: int) -> None:
    """Raise TrainingError for what is no seed of torch's."""
    if not -(2**63) <= value < 2**63:
        raise TrainingError(f"seed is {value}; expected a whole number of 64 bits")


def check_choice(settings: Any, name: str, choices: Sequence[str]) -> None:
    """Raise TrainingError for a field that has none of the choices."""
    if getattr(settings, name) not in choices:
        raise TrainingError(
            f"{name} is {getattr(settings, name)!r}; expected one of "
            f"{', '.join(choices)}"
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

    def __post_init__(self) -> None:
        if self.updates is None:
            updates = max(1, self.length // TOKENS_PER_UPDATE)
            object.__setattr__(self, "updates", updates)  # frozen, but not yet made
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError(
                f"steps is {self.steps} and minutes is {self.minutes}; "
                "expected exactly one of the two"
            )
        optional = [
            name for name in _OPTIONAL_COUNTS if getattr(self, name) is not None
        ]
        check_counts(self, *_COUNTS, *optional)
        check_seed(self.seed)
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TrainingError(f"{name} is {value!r}; expected a number above 0")
        if not 0 < self.alpha <= 1:
            raise TrainingError(f"alpha is {self.alpha}; expected above 0, at most 1")
        check_choice(self, "loss", get_args(LossKind))
        check_choice(self, "dtype", DTYPES)
        if self.length <= self.num_prompt_tokens:
            raise TrainingError(
                f"length is {self.length}, too short to insert "
                f"{self.num_prompt_tokens} prompt tokens; "
                f"expected at least {self.num_prompt_tokens + 1}"
            )

    def learning_rate_at(self, progress: float, steps: float) -> float:
        """Cosine from the peak at progress 0 to zero at 1 and beyond.

        steps: of the whole run, or what it will come to at its present speed.
        """
        assert self.learning_rate is not None  # resolved by now
        part = min(1.0, steps / self.rate_steps) if self.rate_steps else 1.0
        done = min(max(progress, 0.0), 1.0)
        return self.learning_rate * part * 0.5 * (1.0 + math.cos(math.pi * done))
