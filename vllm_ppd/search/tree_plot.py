"""A plan as a picture: speed by load, and the trees of one tier."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from vllm_ppd.search.report import LoadFigures, StateFigures
from vllm_ppd.trees.drawing import chain_nodes

__all__ = ["draw_plan", "node_places"]

_PPD, _PLAIN, _CHAIN, _PROMPT = "#2a9d8f", "#8d99ae", "#6a4c93", "#e9a23b"
_MATCHES = ("no earlier match", "short earlier match", "long earlier match")


def node_places(parents: Sequence[int]) -> list[tuple[float, int]]:
    """(x, depth) of each node, root first: leaves evenly apart, parents above them."""
    depths = [0]
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents, start=1):
        children[parent].append(node)
        depths.append(depths[parent] + 1)
    x = [0.0] * len(depths)
    leaves = 0
    pending = [(0, False)]
    while pending:
        node, seen = pending.pop()
        if seen:
            x[node] = (x[children[node][0]] + x[children[node][-1]]) / 2
        elif children[node]:
            pending.append((node, True))
            pending += [(child, False) for child in reversed(children[node])]
        else:
            x[node] = float(leaves)
            leaves += 1
    return list(zip(x, depths, strict=True))


def draw_plan(
    loads: Sequence[LoadFigures],
    chosen: LoadFigures | None,
    measured: bool,
    title: str,
    suffix: str = "png",
) -> bytes:
    """The picture, as PNG, SVG or PDF.

    Args:
        loads: figures by rising load.
        chosen: the load whose trees are drawn; None where no tier speculates.
        measured: the profile is in seconds.
        title: one line above all.
        suffix: the format.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    grid: list[list[StateFigures]] = []
    for each in chosen.states if chosen else ():
        if each.match_class == len(grid):
            grid.append([])
        grid[each.match_class].append(each)
    columns = max([4, *(len(row) for row in grid)])
    figure = Figure(
        figsize=(2.9 * columns, 3.2 + 2.5 * len(grid)), layout="constrained"
    )
    heights = [1.25] + [1.0] * len(grid)
    cells = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    half = columns // 2
    _speed(figure.add_subplot(cells[0, :half]), loads, measured)
    _tokens(figure.add_subplot(cells[0, half:]), loads)
    for match_class, row in enumerate(grid):
        for state, each in enumerate(row):
            axes = figure.add_subplot(cells[match_class + 1, state])
            _tree(axes, each, len(grid))
    figure.suptitle(title, fontsize=11)
    if chosen:
        figure.supxlabel(
            f"Trees at {chosen.requests} running request{'s' * (chosen.requests > 1)}: "
            "size of a node is the chance to reach it, numbers are prompt tokens, "
            "purple continues an earlier match",
            fontsize=8,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=120)
    return buffer.getvalue()


def _speed(axes: Any, loads: Sequence[LoadFigures], measured: bool) -> None:
    at = range(len(loads))
    ours = [each.tokens_per_second for each in loads]
    plain = [each.plain_tokens_per_second for each in loads]
    axes.plot(at, plain, "o-", color=_PLAIN, label="plain")
    axes.plot(at, ours, "o-", color=_PPD, label="PPD, expected")
    for place, each in enumerate(loads):
        axes.annotate(
            f"{each.gain:.2f}x",
            (place, each.tokens_per_second),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=7,
        )
    unit = "tokens/s" if measured else "tokens per plain step of one request"
    axes.set_ylabel(f"{unit}, all requests", fontsize=8)
    axes.set_yscale("log")
    _by_load(axes, loads)


def _tokens(axes: Any, loads: Sequence[LoadFigures]) -> None:
    at = range(len(loads))
    axes.plot(at, [e.tau for e in loads], "o-", color=_PPD, label="tokens per step")
    axes.plot(at, [e.mean_rows for e in loads], "o-", color=_PROMPT, label="rows")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("per request and step", fontsize=8)
    _by_load(axes, loads)


def _by_load(axes: Any, loads: Sequence[LoadFigures]) -> None:
    axes.set_xticks(range(len(loads)), [str(each.requests) for each in loads])
    axes.set_xlabel("running requests", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _tree(axes: Any, each: StateFigures, classes: int) -> None:
    places = node_places(each.tree.parents)
    on = chain_nodes(each.tree, each.match_class > 0)
    for node, parent in enumerate(each.tree.parents, start=1):
        (x, y), (up, above) = places[node], places[parent]
        colour = _CHAIN if on[node] else _PPD
        axes.plot([up, x], [-above, -y], "-", color=colour, alpha=0.5, linewidth=1)
    for node, (x, y) in enumerate(places):
        colour = "black" if not node else _CHAIN if on[node] else _PPD
        # Area by chance; the least one still visible.
        size = 6 + 70 * float(each.reached[node])
        axes.scatter([x], [-y], s=size, color=colour, zorder=2)
        if each.tree.prompts[node]:
            axes.annotate(
                str(each.tree.prompts[node]),
                (x, -y),
                textcoords="offset points",
                xytext=(5, 4),
                color=_PROMPT,
                fontsize=7,
                fontweight="bold",
            )
    name = f"{_MATCHES[each.match_class]}, " if classes > 1 else ""
    axes.set_title(
        f"{name}state {each.state}\n{each.share:.1%} of steps, {each.tokens:.2f} "
        f"tokens, {each.tree.num_rows} rows",
        fontsize=7,
    )
    deepest, widest = max(y for _, y in places), max(x for x, _ in places)
    axes.set_xlim(-0.8, max(widest, 1.0) + 0.8)
    axes.set_ylim(-max(deepest, 1) - 0.5, 0.5)
    axes.set_axis_off()
