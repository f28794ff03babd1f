"""The trees used when the user names none: the best ones for a fixed row budget.

Until a hardware profile says otherwise, every step may take the same number of rows,
and the trees are the optimum for these prompt tokens' measured acceptance, or for
typical acceptance where no acceptance.json lies beside them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vllm_ppd.acceptance import AcceptanceError, AcceptanceStats
from vllm_ppd.config import PPDConfigError
from vllm_ppd.latency import LatencyCurve
from vllm_ppd.tree import TreePolicy
from vllm_ppd.tree_search import optimal_policy

ACCEPTANCE_FILE = "acceptance.json"

# Rows a step can take before it gets much slower than a plain one: CPU cores are soon
# compute-bound (benchmarks/step_cost.py), a GPU has slack for many more.
DEFAULT_ROWS = {"cpu": 4, "cuda": 32}


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


def default_policy(
    stats: AcceptanceStats, num_ept: int, device: str, max_rows: int | None = None
) -> TreePolicy:
    """The best policy of at most ``max_rows`` rows (root included) in every state.

    Raises:
        PPDConfigError: not even one prompt token fits.
    """
    rows = max_rows or DEFAULT_ROWS.get(device, DEFAULT_ROWS["cpu"])
    if rows < 1 + num_ept:
        raise PPDConfigError(
            f"num_speculative_tokens is {rows - 1}, too small for any tree: one "
            f"prompt token takes {num_ept} row{'s' * (num_ept > 1)}; allow at least "
            f"{num_ept}, or leave it out"
        )
    return optimal_policy(stats, LatencyCurve.constant(1.0), rows, num_ept).policy
