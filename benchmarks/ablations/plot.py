"""Draw the ablations: tokens per step of each run, a panel per table.

python -m benchmarks.ablations.plot benchmarks/results/ablations.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from .document import read_document, values

__all__ = ["draw"]

_COLUMNS = 4
_COLOURS = ("#2a9d8f", "#e9a23b", "#6a4c93", "#264653")


def draw(results: dict[str, Any], out: Path) -> None:
    """Write the picture; the suffix of `out` says whether PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = results["tables"]
    counts = results["settings"]["examination"]["rows"]
    lines = -(-len(tables) // _COLUMNS)
    width = min(len(tables), _COLUMNS)
    figure, panels = pyplot.subplots(
        lines,
        width,
        figsize=(1 + 3.2 * width, 3.6 * lines),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, table in zip(panels.flat, tables, strict=False):
        labels = [row["label"] for row in table["rows"]]
        for colour, count in zip(_COLOURS, counts, strict=False):
            seeds = [
                values(results, row["run"], "rows", str(count), "walked_tau")
                for row in table["rows"]
            ]
            middle = [median(each) for each in seeds]
            reach = [
                [m - min(each) for m, each in zip(middle, seeds, strict=True)],
                [max(each) - m for m, each in zip(middle, seeds, strict=True)],
            ]
            panel.errorbar(
                range(len(labels)),
                middle,
                reach,
                marker="o",
                linestyle="-" if table["ordered"] else "none",
                markersize=4,
                capsize=3,
                color=colour,
                label=f"{count} rows",
            )
        panel.set_title(table["title"], fontsize=8, wrap=True)
        panel.set_xticks(range(len(labels)), labels, fontsize=7)
        if max(map(len, labels)) > 6:
            panel.tick_params(axis="x", rotation=30)
            for tick in panel.get_xticklabels():
                tick.set_horizontalalignment("right")
        panel.set_xlabel(table["variable"], fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(tables) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel("tokens per step")
    panels[0][0].legend(frameon=False, fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help=".png or .svg (default: beside it)")
    args = parser.parse_args(argv)
    out = args.out or args.results.with_suffix(".png")
    if out.suffix not in (".png", ".svg"):
        parser.error(f"--out is {out}; expected a name ending in .png or .svg")
    draw(read_document(args.results), out)
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
