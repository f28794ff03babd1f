"""How `vllm-ppd tree` looks: a table of loads, then the trees in panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vllm_ppd.search.report import LoadFigures, StateFigures, load_labels
from vllm_ppd.trees.drawing import ASCII, LINES, TreeLine, tree_lines
from vllm_ppd.trees.ngram import LENGTHS

if TYPE_CHECKING:
    from vllm_ppd.trees.menu import TreePlan

__all__ = ["loads_table", "match_name", "trees_view"]

CHAIN, GUESS, PROMPT = "magenta", "green", "cyan"
_BAR, _GAIN_BAR = 10, 20
# Columns from which on trees stand side by side.
_WIDE = 92
# States reached less often than this are named, not drawn.
_RARE = 5e-4


def match_name(match_class: int, num_classes: int) -> str:
    """What a match class is, in words; nothing where there is only one."""
    if num_classes == 1:
        return ""
    if not match_class:
        return "no earlier match"
    low, high = LENGTHS[match_class - 1]
    longest = match_class == len(LENGTHS)
    length = f"{low} or more" if longest else f"{low} to {high}"
    return f"earlier match of {length} tokens"


def percent(chance: float) -> str:
    """At most five characters."""
    if 0 < chance < 0.001:
        return "<.1%"
    digits = 0 if chance >= 0.0995 else 1
    return f"{100 * chance:.{digits}f}%"


def bar(part: float, width: int, utf8: bool) -> str:
    """`part` of a bar of `width` columns, to an eighth of a column."""
    part = min(max(part, 0.0), 1.0)
    if not utf8:
        return "#" * round(part * width)
    eighths = round(8 * width * part)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def loads_table(
    figures: Sequence[LoadFigures],
    plan: TreePlan,
    measured: bool,
    exact: bool,
    utf8: bool = True,
) -> Table:
    """Per load what is expected.

    measured: the profile is in seconds. exact: the loads are those asked for, not the
    upper ends of tiers.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    heads = ["requests", "tokens\nper step", "rows\nper step", "time of\nplain step"]
    if measured:
        heads += ["step,\nms", "tokens\nper s"]
    for head in (*heads, "speed of\nplain"):
        width = max(map(len, head.split("\n")))
        table.add_column(head, justify="right", vertical="bottom", min_width=width)
    table.add_column(no_wrap=True)
    loads = [each.requests for each in figures]
    labels = [f"{load}" for load in loads] if exact else load_labels(loads)
    most = max(each.gain for each in figures)
    for label, each in zip(labels, figures, strict=True):
        on = bool(plan.tiers[each.tier].policies)
        cells = [label, f"{each.tau:.2f}", f"{each.mean_rows:.1f}"]
        cells.append(f"{each.seconds / each.plain_seconds:.2f}")
        if measured:
            cells += [f"{1000 * each.seconds:.2f}", f"{each.tokens_per_second:,.0f}"]
        cells.append(f"{each.gain:.2f}x")
        note = Text(bar(each.gain / max(most, 1.0), _GAIN_BAR, utf8), GUESS)
        if not on:
            note = Text("plain decoding", "dim")
        table.add_row(*cells, note, style=None if on else "dim")
    return table


def trees_view(
    figures: LoadFigures,
    title: str,
    console: Console,
    limit: int | None,
    utf8: bool = True,
) -> RenderableType:
    """The trees of one tier, class by class; at most `limit` lines each."""
    parts: list[RenderableType] = [Rule(title, style="dim", characters="-─"[utf8])]
    classes = 1 + max(each.match_class for each in figures.states)
    for match_class in range(classes):
        states = [each for each in figures.states if each.match_class == match_class]
        share = sum(each.share for each in states)
        if name := match_name(match_class, classes):
            parts.append(Text.assemble((name, "bold"), f": {percent(share)} of steps"))
        groups = _alike(states)
        rare = [g for g in groups if limit and sum(each.share for each in g) < _RARE]
        drawn = [group for group in groups if group not in rare]
        two = console.width >= _WIDE and len(drawn) > 1
        width = (console.width - 1) // 2 if two else min(console.width, 64)
        panels = [
            _panel(group, bool(match_class), width, limit, utf8) for group in drawn
        ]
        beside = Table.grid(padding=(0, 1, 0, 0))
        for at in range(0, len(panels), 1 + two):
            beside.add_row(*panels[at : at + 1 + two])
        parts.append(beside)
        if rare:
            named = _states([each for group in rare for each in group])
            parts.append(Text(f"{named}: not reached by these trees", "dim"))
    mark = "◆" if utf8 else "o"
    legend = (
        f"+1: a token ahead   1, 2: guesses, best first   {mark}: a prompt token on it"
    )
    if classes > 1:
        legend += "   copy: of the earlier text"
    parts.append(Text(legend, "dim"))
    return Group(*parts)


def _states(states: Sequence[StateFigures]) -> str:
    names = ", ".join(str(each.state) for each in states)
    return f"state{'s' * (len(states) > 1)} {names}"


def _alike(states: Sequence[StateFigures]) -> list[list[StateFigures]]:
    """States with the same tree and chances together."""
    groups: list[list[StateFigures]] = []
    for each in states:
        for group in groups:
            same = group[0].tree == each.tree
            if same and np.allclose(group[0].reached, each.reached):
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


def _panel(
    group: Sequence[StateFigures],
    chained: bool,
    width: int,
    limit: int | None,
    utf8: bool,
) -> Panel:
    first = group[0]
    lines, hidden = tree_lines(
        first.tree, first.reached, chained, limit, LINES if utf8 else ASCII
    )
    body: list[RenderableType] = [_drawing(lines, width - 4, utf8)]
    if hidden:
        seen = {node for line in lines for node in line.nodes}
        left = [c for node, c in enumerate(first.reached) if node not in seen]
        body.append(
            Text(f"... {hidden} more, each {percent(max(left))} or less", "dim")
        )
    share = sum(each.share for each in group)
    tree = first.tree
    prompts = tree.num_rows - tree.num_nodes
    rows = "a plain step" if tree.num_rows == 1 else f"{tree.num_rows} rows: "
    if tree.num_rows > 1:
        rows += f"{tree.num_nodes} of tokens, {prompts} of prompts"
    return Panel(
        Group(*body),
        title=f"[bold]{_states(group)}[/]: {percent(share)} of steps, "
        f"{first.tokens:.2f} tokens",
        title_align="left",
        subtitle=rows,
        subtitle_align="right",
        border_style="dim",
        width=width,
    )


def _drawing(lines: Sequence[TreeLine], width: int, utf8: bool) -> Text:
    """Depth, node, chance, bar and prompt tokens of each line, in columns."""
    indent = max(cell_len(line.guide + line.label) for line in lines)
    chances = [_chance(line.reached) for line in lines]
    prompts = [_prompts(line, utf8) for line in lines]
    taken = 4 + indent + max(map(len, chances)) + 2 + max(map(len, prompts))
    room = min(_BAR, width - taken - 1)
    drawing = Text(no_wrap=True, overflow="ellipsis")
    for line, chance, prompt in zip(lines, chances, prompts, strict=True):
        style = CHAIN if line.on_chain else GUESS if line.ranks else "bold"
        drawing.append(f"{f'+{line.depth}':<4}", "dim")
        drawing.append(line.guide, "dim")
        drawing.append(line.label.ljust(indent - cell_len(line.guide)), style)
        drawing.append(f" {chance:>{max(map(len, chances))}} ")
        if room >= 3:
            filled = bar(max(line.reached), room, utf8)
            drawing.append(filled.ljust(room) + " ", style)
        drawing.append(prompt, PROMPT)
        drawing.append("\n" if line is not lines[-1] else "")
    return drawing


def _chance(reached: Sequence[float]) -> str:
    most, least = percent(max(reached)), percent(min(reached))
    return most if most == least else f"{least.rstrip('%')}-{most}"


def _prompts(line: TreeLine, utf8: bool) -> str:
    mark = "◆" if utf8 else "o"
    prompts = mark * line.prompts if line.prompts <= 4 else f"{line.prompts}{mark}"
    return prompts + " each" * bool(line.prompts and len(line.nodes) > 1)
