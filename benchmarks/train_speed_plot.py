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

    figure, (left, *others) = pyplot.subplots(
        1,
        1 + len(results["quality"]),
        figsize=(4.4 * (1 + len(results["quality"])), 3.6),
        layout="constrained",
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
    own = results["settings"]
    (rows,) = own["examination"]["rows"]
    names = {
        "one": "1 point per sequence",
        "many": f"{own['points']} points, {{updates}} updates per pass",
    }
    for panel, cell in zip(others, results["quality"], strict=True):
        for name, curve in cell["curves"].items():
            panel.plot(
                [point["seconds"] for point in curve],
                [point["tokens_per_step"] for point in curve],
                marker="o",
                label=names[name].format(updates=cell["updates"]),
            )
        level = cell["comparison"][-1]["tokens_per_step"]
        panel.axhline(level, color="grey", linewidth=0.8, linestyle="--")
        panel.set(
            xscale="log",
            xlabel="seconds of training",
            ylabel=f"tokens per step, trees of {rows} rows",
            title=f"sequences of {cell['length']} tokens",
        )
    for panel in (left, *others):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
