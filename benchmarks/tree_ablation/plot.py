"""Draw the tree ablation: tokens per step by rows, a panel per source of guesses.

python -m benchmarks.tree_ablation.plot benchmarks/results/tree_ablation.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .document import cells_of, read_document
from .page import decoding_name, source_name, unique
from .prediction import DEMO

__all__ = ["draw"]

_COLOURS = {
    "ours": "#2a9d8f",
    "paper": "#e9a23b",
    "chain": "#6a4c93",
    "full": "#264653",
    "random": "#b5b5b5",
}


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Write the picture; the ending of `out` says whether PNG or SVG.

    Top: predicted for the demo model. Then measured, a line per temperature. Last:
    predicted from the paper's tables.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _panels(results)
    width = max(len(panels) for _, panels in rows)
    figure, grid = pyplot.subplots(
        len(rows),
        width,
        figsize=(1 + 3.1 * width, 2.9 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for line, (label, panels) in zip(grid, rows, strict=True):
        highest = max(v for _, cells in panels for _, _, v, _ in cells)
        for axes, (title, cells) in zip(line, panels, strict=False):
            _panel(axes, title, cells)
            axes.set_ylim(1, 1 + 1.08 * (highest - 1))
        for axes in line[len(panels) :]:
            axes.set_visible(False)
        line[0].set_ylabel(label, fontsize=8)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.supxlabel("most rows of a tree", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


# (kind, rows, tokens per step, half an interval)
_Point = tuple[str, int, float, float]


def _panels(
    results: Mapping[str, Any],
) -> list[tuple[str, list[tuple[str, list[_Point]]]]]:
    """Lines of panels: (what is shown, [(title, points)])."""
    lines = []
    predicted = results["predicted"]
    by_source = _by_source(
        cells_of(predicted, statistics=DEMO), lambda c: (c["tau"], 0.0)
    )
    if by_source:
        lines.append(("tokens per step, predicted", by_source))
    measured = results["measured"]
    for temperature in measured[0]["temperatures"] if measured else ():

        def figures(cell: Mapping[str, Any], at: str = temperature) -> Any:
            found = cell["temperatures"][at]
            return found["tokens_per_step"], found["half_width_95"]

        name = f"measured, {decoding_name(temperature)}"
        lines.append((name, _by_source(measured, figures)))
    papers = [
        (name, [(c["kind"], c["rows"], c["tau"], 0.0) for c in cells])
        for (name,) in unique(predicted, "statistics")
        if name != DEMO and (cells := cells_of(predicted, statistics=name))
    ]
    if papers:
        lines.append(("predicted, published tables", papers))
    return lines


def _by_source(
    cells: Sequence[Mapping[str, Any]], figures: Any
) -> list[tuple[str, list[_Point]]]:
    return [
        (
            source_name(bigram, ngram),
            [
                (cell["kind"], cell["rows"], *figures(cell))
                for cell in cells_of(cells, bigram=bigram, ngram=ngram)
            ],
        )
        for bigram, ngram in unique(cells, "bigram", "ngram")
    ]


def _panel(axes: Any, title: str, points: Sequence[_Point]) -> None:
    for kind, colour in _COLOURS.items():
        found = sorted(point[1:] for point in points if point[0] == kind)
        if found:
            rows, values, widths = zip(*found, strict=True)
            axes.errorbar(
                rows,
                values,
                widths if any(widths) else None,
                marker="o",
                markersize=4,
                capsize=3,
                color=colour,
                label=kind,
            )
    counts = sorted({point[1] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


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
