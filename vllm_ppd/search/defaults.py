"""The trees used when the user names none: the best ones for what is known.

What is known of the guesses comes from the prompt-token folder (acceptance.json, else
acceptance.json, else typical figures), and what is known of the machine from its
latency profile (measured, else a typical one).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from vllm_ppd.config import PPDConfigError
from vllm_ppd.search.acceptance import (
    ACCEPTANCE_FILE,
    AcceptanceModel,
    MeasurementError,
)
from vllm_ppd.search.acceptance_table import AcceptanceError, AcceptanceStats

ACCEPTANCE_FILE = "acceptance.json"

# Most rows of a tree where the user sets no limit: CPU cores are soon compute-bound
# (benchmarks/step_cost.py), a GPU has slack for many more.
DEFAULT_ROWS = {"cpu": 16, "cuda": 64}


def typical_acceptance(num_prompt_tokens: int, num_ranks: int = 10) -> AcceptanceStats:
    """Acceptance between that of the paper's models and of small ones.

    The best guess is right with probability .40, .24, .15 ... at distance 1, 2, 3 ...
    (Vicuna-7B: .48, .26, .16; MobileLLaMA: .35, .18, .12), lower ranks fall as a power.
    """
    best = 0.4 * 0.6 ** np.arange(num_prompt_tokens)
    return AcceptanceStats(best[:, None] * np.arange(1, num_ranks + 1.0) ** -1.3)


def acceptance_of(folder: Path, num_prompt_tokens: int) -> AcceptanceStats:
    """The acceptance measured for a prompt-token folder, else a typical one.

    Raises:
        AcceptanceError: an acceptance.json that is damaged or of other prompt tokens.
    """
    path = folder / ACCEPTANCE_FILE
    if not path.exists():
        return typical_acceptance(num_prompt_tokens)
    stats = AcceptanceStats.load(path)
    if stats.num_prompt_tokens != num_prompt_tokens:
        raise AcceptanceError(
            f"{path} is about {stats.num_prompt_tokens} prompt tokens, but the folder "
            f"holds {num_prompt_tokens}; measure it again or remove it"
        )
    return stats


def evidence_of(
    folder: Path, num_prompt_tokens: int, conditioned: bool, suffix: bool
) -> AcceptanceModel:
    """What is known about the guesses of a prompt-token folder.

    Args:
        folder: the prompt tokens'.
        num_prompt_tokens: how many they are.
        conditioned: a bigram table will be used.
        suffix: earlier matches will be looked for.

    Raises:
        AcceptanceError, MeasurementError: a file that is damaged or of other tokens.
    """
    stats = acceptance_of(folder, num_prompt_tokens)
    path = folder / ACCEPTANCE_FILE
    if path.exists():
        acceptance = AcceptanceModel.load(path)
        if acceptance.num_prompt_tokens != num_prompt_tokens:
            raise MeasurementError(
                f"{path} is about {acceptance.num_prompt_tokens} prompt tokens, but the "
                f"folder holds {num_prompt_tokens}; measure it again or remove it"
            )
        if not conditioned:
            # Its ranks are those of the table; the prompt rows' own are in `stats`.
            bare = AcceptanceModel.of(stats)
            acceptance = replace(
                bare,
                chain=acceptance.chain,
                beside=np.stack([0.7 * stats.acceptance] * len(acceptance.chain)),
                moves=acceptance.moves,
            )
    else:
        acceptance = AcceptanceModel.of(stats)
    return acceptance.with_typical_chains() if suffix else acceptance.without_chains()


def row_limit(device: str, num_ept: int, num_speculative_tokens: int | None) -> int:
    """Most rows of a tree, root included.

    Raises:
        PPDConfigError: not even one prompt token fits.
    """
    if num_speculative_tokens is None:
        return max(DEFAULT_ROWS[device], 1 + num_ept)
    if num_speculative_tokens < num_ept:
        raise PPDConfigError(
            f"num_speculative_tokens is {num_speculative_tokens}, too small for any "
            f"tree: one prompt token takes {num_ept} row{'s' * (num_ept > 1)}; allow "
            f"at least {num_ept}, or leave it out"
        )
    return num_speculative_tokens + 1
