"""How the demo looks: two panels that fill on one clock, then a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.align import Align
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_ppd.cli.demo_report import Comparison, Totals
from vllm_ppd.cli.generation import Generation

OWN, GUESSED, PROMPT = "default", "bold green", "dim"
TITLES = ("plain vLLM", "vLLM with PPD")
BORDERS = ("blue", "green")
# A replay that is over sooner than this cannot be followed by eye.
REPLAY_S = 4.0
FRAMES_PER_S = 20
PANEL_LINES = 16
NARROW = 76  # columns below which the panels stand one above the other


def header(model: str, prompt_tokens: str, args: argparse.Namespace) -> Panel:
    """What is about to be compared."""
    table = Table.grid(padding=(0, 2))
    mode = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    for name, value in (
        ("model", model),
        ("prompt tokens", prompt_tokens),
        ("decoding", f"{mode}, {args.max_tokens} tokens, one request at a time"),
    ):
        table.add_row(f"[dim]{name}[/]", escape(value))
    return Panel(
        table,
        title="[bold]Parallel Prompt Decoding, beside plain vLLM[/]",
        border_style="dim",
        expand=False,
    )


def panel(
    console: Console,
    title: str,
    border: str,
    prompt: str,
    generation: Generation,
    until_s: float,
    width: int,
    done: bool,
) -> Panel:
    """One decoder's text as it stood `until_s` after the start."""
    text = Text()
    text.append("\n".join(prompt.split("\n")[-3:]), PROMPT)
    tokens = steps = 0
    at = 0.0
    for step in generation.steps:
        if step.at_s > until_s:
            break
        text.append(step.guessed, style=GUESSED)
        text.append(step.own, style=OWN)
        tokens, steps, at = tokens + len(step.ids), steps + 1, step.at_s
    if not done:
        text.append("\u2588", style=border)
    text.expand_tabs(4)
    lines = text.wrap(console, width - 4)[-PANEL_LINES:]
    speed = f"{tokens / at:,.0f} tokens/s" if at else "waiting"
    return Panel(
        Text("\n").join(lines),
        title=f"[bold]{title}[/]",
        subtitle=f"{tokens} tokens, {steps} steps, {at:.2f} s, [bold]{speed}[/]",
        border_style=border,
        width=width,
        height=PANEL_LINES + 2,
        padding=(0, 1),
    )


def side_by_side(
    console: Console,
    prompt: str,
    plain: Generation,
    ppd: Generation,
    until_s: float,
    note: str,
    running: str | None = None,
) -> RenderableType:
    """Both panels at one moment; `running` is the title of a panel still written to."""
    narrow = console.width < NARROW
    width = console.width if narrow else (console.width - 1) // 2
    panels = [
        panel(
            console,
            title,
            border,
            prompt,
            generation,
            until_s,
            width,
            until_s >= generation.seconds and title != running,
        )
        for title, border, generation in zip(TITLES, BORDERS, (plain, ppd), strict=True)
    ]
    body = Group(*panels) if narrow else Columns(panels, padding=(0, 1))
    legend = Text.assemble(
        ("accepted guesses", GUESSED), (f"  {note}" if note else "", "dim")
    )
    return Group(body, Align.center(legend))


def replay(console: Console, comparison: Comparison, moving: bool) -> None:
    """Show the first round of both at once, slowed down so that it can be read.

    moving: otherwise show the end only, for a run that was watched as it happened.
    """
    plain, ppd = comparison.plain[0], comparison.ppd[0]
    end = max(plain.seconds, ppd.seconds)
    slower = 1.0 if not end else max(1.0, REPLAY_S / end)
    if not moving:
        console.print(side_by_side(console, comparison.prompt, plain, ppd, end, ""))
        return
    note = f"replayed {slower:.0f}x slower than it was, both on one clock"
    with Live(console=console, auto_refresh=False) as view:
        start = time.perf_counter()
        now = 0.0
        while now < end:
            now = min(end, (time.perf_counter() - start) / slower)
            frame = side_by_side(console, comparison.prompt, plain, ppd, now, note)
            view.update(frame, refresh=True)
            time.sleep(1 / FRAMES_PER_S)


def print_plainly(console: Console, number: int, total: int, c: Comparison) -> None:
    """The same for a pipe or a log: no panels, no colours, no motion."""
    last = c.prompt.strip().split("\n")[-1].strip()
    console.print(f"\nPrompt {number} of {total}, ending in: {escape(last)}")
    speeds, texts = (c.plain_speed, c.ppd_speed), (c.plain[0], c.ppd[0])
    for name, speed, g in zip(TITLES, speeds, texts, strict=True):
        console.print(
            f"  {name:<13}  {len(g.ids)} tokens in {len(g.steps)} steps, "
            f"{speed:,.0f} tokens/s"
        )
    if c.first_difference is None:
        shown = [("both", c.ppd[0])]
    else:
        shown = list(zip(TITLES, texts, strict=True))
    for name, g in shown:
        console.print(f"  text of {name}:")
        for line in g.text.strip("\n").splitlines():
            print(f"    | {line}", file=console.file)


def summary(comparisons: Sequence[Comparison], greedy: bool) -> Table:
    """One row per prompt and a row for all."""
    table = Table(title="plain vLLM -> vLLM with PPD", title_style="bold")
    table.add_column("prompt")
    for name in ("tokens/s", "speed", "steps", "tokens/step"):
        table.add_column(name, justify="right")
    table.add_column("token ids")
    for number, c in enumerate(comparisons, start=1):
        where = c.first_difference
        same = "identical" if where is None else f"differ at {where + 1}"
        table.add_row(
            str(number),
            f"{c.plain_speed:,.0f} -> {c.ppd_speed:,.0f}",
            _speed(c.speedup),
            f"{len(c.plain[0].steps)} -> {len(c.ppd[0].steps)}",
            f"{c.ppd[0].tokens_per_step:.2f}",
            same if greedy else "sampled",
        )
    totals = Totals.of(comparisons)
    table.add_section()
    table.add_row(
        "all",
        "",
        _speed(totals.speedup),
        f"{totals.plain_steps} -> {totals.ppd_steps}",
        f"{totals.tokens_per_step:.2f}",
        "",
    )
    return table


def _speed(ratio: float) -> str:
    colour = "green" if ratio >= 1.02 else "yellow" if ratio > 0.98 else "red"
    return f"[bold {colour}]{ratio:.2f}x[/]"
