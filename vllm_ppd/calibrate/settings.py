"""Everything about a calibration that changes its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_ppd.train.settings import DTYPES, TrainingError

__all__ = ["CalibrationSettings"]


@dataclass(frozen=True)
class CalibrationSettings:
    """Raises TrainingError for a value out of range."""

    points: int = 20_000
    """Insertion points, as far as the text goes."""
    points_per_prompt: int = 40
    """Of one continuation; few of many are better than many of few."""
    temperature: float = 0.0
    """Of the continuations; 0 is greedy."""
    ranks: int = 32
    """K: candidates per distance."""
    prompt_length: int = 96
    """Tokens of held-out text that are continued."""
    continuation: int = 160
    """Tokens written after each prompt, unless the model ends its text before."""
    batch_size: int = 32
    """Prompts at once."""
    dtype: str = "auto"
    """Number format of the model; auto is the checkpoint's own."""
    bigram: int = 32
    """Next tokens listed for each token in the bigram table; 0 makes none."""
    bigram_tokens: int = 200_000
    """Tokens of text, at most half of it, whose next-token distributions the table is
    made of; what is measured comes from the rest."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "points",
            "points_per_prompt",
            "ranks",
            "prompt_length",
            "continuation",
            "batch_size",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise TrainingError(
                    f"{name} is {value!r}; expected a whole number of at least 1"
                )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise TrainingError(
                f"temperature is {self.temperature}; expected 0 (greedy) or above"
            )
        for name in ("bigram", "bigram_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise TrainingError(
                    f"{name} is {value!r}; expected a whole number of at least 0"
                )
        if self.dtype not in DTYPES:
            raise TrainingError(
                f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}"
            )

    def check_fits(self, num_prompt_tokens: int, vocab_size: int) -> None:
        """Raise TrainingError unless a point and its m distances find room."""
        least = num_prompt_tokens + 2
        if self.continuation < least:
            raise TrainingError(
                f"continuation is {self.continuation}, too short for "
                f"{num_prompt_tokens} prompt tokens; expected at least {least}"
            )
        if self.ranks > vocab_size:
            raise TrainingError(
                f"ranks is {self.ranks}, but the vocabulary has {vocab_size} tokens; "
                f"expected at most {vocab_size}"
            )
