"""Everything about a calibration that changes its result."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vllm_ppd.train.settings import (
    DTYPES,
    TrainingError,
    check_choice,
    check_counts,
    check_seed,
    check_temperature,
)
from vllm_ppd.trees.tree import MAX_ROWS


@dataclass(frozen=True)
class CalibrationSettings:
    """Raises TrainingError for a value out of range."""

    points: int = 20_000
    """Insertion points; fewer if the data are short."""
    points_per_prompt: int = 40
    """Of one continuation; few of many are better than many of few."""
    temperature: float = 0.0
    """Of the continuations; 0 is greedy."""
    ranks: int = 32
    """K: draft tokens per distance."""
    prompt_length: int = 96
    """Tokens of held-out text that are continued."""
    continuation: int = 160
    """Tokens generated after each prompt, unless the model ends its text before."""
    batch_size: int = 32
    """Prompts at once."""
    dtype: str = "auto"
    """Number format of the model; auto is the checkpoint's own."""
    bigram_entries: int = 32
    """Next tokens listed for each token in the bigram table; 0 makes none."""
    bigram_tokens: int = 200_000
    """Tokens of text, at most half of it, whose next-token distributions the bigram
    table is made of; acceptance is measured on the rest."""
    variable_rows: int = 16
    """Most rows of a tree in the menu for engines whose trees differ in size."""
    fixed_rows: int = 64
    """Most rows of a tree in the menu for engines that pad all trees of a step."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = [f.name for f in fields(self) if f.type == "int" and f.name != "seed"]
        for name in counts:
            # No bigram table is a choice.
            check_counts(self, name, least=0 if name.startswith("bigram") else 1)
        check_seed(self.seed)
        check_temperature(self.temperature)
        check_choice(self, "dtype", DTYPES)

    def check_fits(self, num_prompt_tokens: int, num_ept: int, vocab_size: int) -> None:
        """Raise TrainingError unless points, trees and lists are possible."""
        for name, least, reason in (
            (
                "continuation",
                num_prompt_tokens + 2,
                f"{num_prompt_tokens} prompt tokens",
            ),
            ("variable_rows", 1 + num_ept, f"{num_ept} EPT per prompt token"),
            ("fixed_rows", 1 + num_ept, f"{num_ept} EPT per prompt token"),
        ):
            if getattr(self, name) < least:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}, too few for {reason}; expected "
                    f"at least {least}"
                )
        for name, limit, reason in (
            ("ranks", vocab_size, f"the vocabulary has {vocab_size} tokens"),
            ("variable_rows", MAX_ROWS, "vLLM has a limit"),
            ("fixed_rows", MAX_ROWS, "vLLM has a limit"),
        ):
            if getattr(self, name) > limit:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}, but {reason}; expected at most "
                    f"{limit}"
                )
