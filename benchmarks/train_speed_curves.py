"""Quality over time as train_speed.py has it: curves, and how much sooner one rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

# Quality is tokens per step of the best trees with so many rows, a middling number.
ROWS = 16


def quality(record: Mapping[str, Any]) -> float:
    """Tokens per step that a training's prompt tokens reach on held-out prompts."""
    return record["rows"][str(ROWS)]["walked_tau"]


def curve_of(records: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Points of a curve: what was spent, and what it brought in the mean of the seeds.

    records: of every duration, those of all seeds.
    """
    return [
        {
            "run": seeds[0]["run"],
            "seconds": round(fmean(each["cost"]["seconds"] for each in seeds), 2),
            "tokens_per_step": round(fmean(map(quality, seeds)), 4),
            "seeds": [quality(each) for each in seeds],
            "top1": seeds[0]["acceptance"]["top1"],
            "top10": seeds[0]["acceptance"]["top10"],
            "positions": seeds[0]["cost"]["positions"],
            "learning_rate": seeds[0]["cost"]["learning_rate"],
            "batch_size": seeds[0]["settings"]["batch_size"],
        }
        for seeds in records
    ]


def compared(
    one: Sequence[Mapping[str, Any]], many: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """How much sooner `many` reaches each level that `one` reaches, the best last.

    Both are curves. Seconds are those of the shortest training that is as good;
    None when there is none.
    """

    def seconds(curve: Sequence[Mapping[str, Any]], level: float) -> float | None:
        times = [p["seconds"] for p in curve if p["tokens_per_step"] >= level]
        return min(times, default=None)

    found = []
    for level in sorted({point["tokens_per_step"] for point in one}):
        slow, fast = seconds(one, level), seconds(many, level)
        found.append(
            {
                "tokens_per_step": level,
                "one_point_s": slow,
                "many_points_s": fast,
                "times_sooner": round(slow / fast, 2) if slow and fast else None,
            }
        )
    return found
