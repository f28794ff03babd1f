"""Draw the results of train_speed.py: predictions per second, quality over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Write the picture; the suffix of `out` says whether PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.6), layout="constrained"
    )
    for cell in results["cells"]:
        counts = [int(count) for count in cell["points"]]
        ratios = [figures["ratio"]["median"] for figures in cell["points"].values()]
        label = f"sequences of {cell['length']} tokens"
        left.plot(counts, ratios, marker="o", label=label)
    left.axhline(20, color="grey", linewidth=0.8, linestyle="--")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="insertion points per sequence",
        ylabel="predictions/s, over those of 1 point",
    )
    points = results["settings"]["points"]
    (rows,) = results["settings"]["examination"]["rows"]
    names = {"one": "1 point per sequence", "many": f"{points} points"}
    for name, curve in results["quality"]["curves"].items():
        right.plot(
            [point["seconds"] for point in curve],
            [point["tokens_per_step"] for point in curve],
            marker="o",
            label=names[name],
        )
    level = results["quality"]["comparison"]["tokens_per_step"]
    right.axhline(level, color="grey", linewidth=0.8, linestyle="--")
    right.set(
        xscale="log",
        xlabel="seconds of training",
        ylabel=f"tokens per step, trees of {rows} rows",
    )
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
