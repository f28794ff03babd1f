"""What step_cost.py says of its measurements, in figures and as text."""

from __future__ import annotations

import statistics
from typing import Any


def summarise(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Milliseconds: medians over turns, with the fastest and slowest turn."""

    def ms(values: list[float]) -> float:
        return round(1000 * statistics.median(values), 4)

    return {
        name: {
            "step_ms": ms([r["step"] for r in results]),
            "step_ms_min": ms([min(r["step"] for r in results)]),
            "step_ms_max": ms([max(r["step"] for r in results)]),
            "tokens_per_step": results[0]["tokens_per_step"],
            "parts_ms": {
                part: ms([r["parts"].get(part, 0.0) for r in results])
                for part in results[0]["parts"]
            },
        }
        for name, results in turns.items()
    }


def speedups(
    plain: list[dict[str, Any]], ppd: list[dict[str, Any]]
) -> dict[str, float]:
    """Tokens per second of PPD against plain, one request each, turn by turn."""
    ratios = [
        p["tokens_per_step"] * a["step"] / p["step"]
        for a, p in zip(plain, ppd, strict=True)
    ]
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def show(cell: dict[str, Any]) -> None:
    print(f"\ncontext {cell['context']}")
    parts = sorted({p for d in cell["decoders"].values() for p in d["parts_ms"]})
    print(f"{'ms':22}" + "".join(f"{name:>12}" for name in cell["decoders"]))
    rows = [("step", [d["step_ms"] for d in cell["decoders"].values()])]
    rows += [
        (p, [d["parts_ms"].get(p, 0.0) for d in cell["decoders"].values()])
        for p in parts
    ]
    for name, values in rows:
        print(f"{name:22}" + "".join(f"{value:12.3f}" for value in values))
    print(f"tokens/s against plain x1: {cell['ppd_speedup']}")
