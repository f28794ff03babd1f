"""When a run has stopped getting better, told by its held-out evaluations alone.

The measure is the paper's loss on held-out text, whatever the run is trained on:
guesses are accepted where they agree with the frozen model. It is taken from the
history that a checkpoint carries, so a continued run stops where the undisturbed one
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["best_record", "evaluations_since_best", "held_out_loss"]


def held_out_loss(record: dict[str, Any], alpha: float) -> float:
    """sum_i alpha^(i-1) KL_i in nats, of an evaluation with `kl` per distance."""
    return sum(kl * alpha**i for i, kl in enumerate(record["kl"]))


def best_record(history: Sequence[dict[str, Any]], alpha: float) -> dict[str, Any]:
    """The evaluation of least loss, the first of equals. Raises ValueError if none."""
    return min(history, key=lambda record: held_out_loss(record, alpha))


def evaluations_since_best(history: Sequence[dict[str, Any]], alpha: float) -> int:
    """How many evaluations, of different steps, followed the best one."""
    if not history:
        return 0
    best = best_record(history, alpha)["step"]
    return len({record["step"] for record in history if record["step"] > best})
