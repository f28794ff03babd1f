"""What `vllm-ppd demo` shows: two panels that fill on one clock, a table, a verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from statistics import median

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_ppd.engine.generation import Generation

OWN, DRAFTED, PROMPT = "default", "bold green", "dim"
TITLES = ("plain vLLM", "vLLM with PPD")
BORDERS = ("blue", "green")
# Shorter replays cannot be followed by eye, longer ones take too long.
REPLAY_S = (4.0, 20.0)
FRAMES_PER_S = 20
PANEL_LINES = 16
NARROW = 76  # columns below which the panels stand one above the other
# Share of repeated 4-grams from which the verdict mentions it.
LOOPING = 0.3


@dataclass(frozen=True)
class Comparison:
    """One prompt and its texts, one per round and decoder."""

    prompt: str
    plain: tuple[Generation, ...]
    ppd: tuple[Generation, ...]

    @property
    def speedup(self) -> float:
        """PPD's speed over the plain one's of the same round, median of the rounds."""
        return median(
            ppd.tokens_per_s / plain.tokens_per_s
            for plain, ppd in zip(self.plain, self.ppd, strict=True)
        )

    @property
    def first_difference(self) -> int | None:
        """Of the texts of the first round."""
        return first_difference(self.ppd[0].ids, self.plain[0].ids)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token id that differs, or that one of them lacks; or None."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((i for i, (a, b) in pairs if a != b), None)


def _step_ms(generations: Sequence[Generation]) -> float:
    """Median duration of a decode step in milliseconds."""
    times = [[step.at_s for step in g.steps] for g in generations]
    gaps = [b - a for each in times for a, b in pairwise(each)]
    return 1000 * median(gaps) if gaps else 0.0


def frame(console: Console, c: Comparison, until_s: float, note: str) -> Group:
    """Both decoders' texts as they stood `until_s` after their common start."""
    narrow = console.width < NARROW
    width = console.width if narrow else (console.width - 1) // 2
    panels = []
    texts = zip(TITLES, BORDERS, (c.plain[0], c.ppd[0]), strict=True)
    for title, border, generation in texts:
        text = Text("\n".join(c.prompt.split("\n")[-3:]), PROMPT)
        steps = [step for step in generation.steps if step.at_s <= until_s]
        for step in steps:
            text.append(step.drafted, style=DRAFTED)
            text.append(step.own, style=OWN)
        if until_s < generation.seconds:
            text.append("\u2588", style=border)
        text.expand_tabs(4)
        lines = text.wrap(console, width - 4)[-PANEL_LINES:]
        tokens, at = sum(len(s.ids) for s in steps), steps[-1].at_s if steps else 0.0
        speed = f"{tokens / at:,.0f} tokens/s" if at else "waiting"
        panel = Panel(
            Text("\n").join(lines),
            title=f"[bold]{title}[/]",
            subtitle=f"{tokens} tokens, {len(steps)} steps, [bold]{speed}[/]",
            border_style=border,
            width=width,
            height=PANEL_LINES + 2,
            padding=(0, 1),
        )
        panels.append(panel)
    body = Group(*panels) if narrow else Columns(panels, padding=(0, 1))
    return Group(body, Text.assemble(("accepted draft tokens", DRAFTED), f"  {note}"))


def replay(console: Console, comparison: Comparison) -> None:
    """Show the first round of both at once, at a speed that can be read.

    A pipe or a log gets the last moment alone.
    """
    end = max(comparison.plain[0].seconds, comparison.ppd[0].seconds)
    if not console.is_terminal:
        console.print(frame(console, comparison, end, ""))
        return
    duration = min(max(end, REPLAY_S[0]), REPLAY_S[1])
    slower = duration / end if end else 1.0
    how = f"{slower:.0f}x slower" if slower >= 1 else f"{1 / slower:.0f}x faster"
    note = f"replayed {how} than measured, both on one clock"
    with Live(console=console, auto_refresh=False) as view:
        start = time.perf_counter()
        now = 0.0
        while now < end:
            now = min(end, (time.perf_counter() - start) / slower)
            view.update(frame(console, comparison, now, note), refresh=True)
            time.sleep(1 / FRAMES_PER_S)


def summary(comparisons: Sequence[Comparison], greedy: bool) -> Table:
    """One row per prompt and a row for all."""
    table = Table(title="plain vLLM -> vLLM with PPD", title_style="bold")
    table.add_column("prompt")
    for name in ("tokens/s", "speed", "steps", "tokens per step"):
        table.add_column(name, justify="right")
    table.add_column("token ids")
    for number, c in enumerate(comparisons, start=1):
        where = c.first_difference
        same = "identical" if where is None else f"differ at {where + 1}"
        plain, ppd = (median(g.tokens_per_s for g in each) for each in (c.plain, c.ppd))
        table.add_row(
            str(number),
            f"{plain:,.0f} -> {ppd:,.0f}",
            _speed(c.speedup),
            f"{len(c.plain[0].steps)} -> {len(c.ppd[0].steps)}",
            f"{c.ppd[0].acceptance_length:.2f}",
            same if greedy else "sampled",
        )
    if len(comparisons) > 1:
        table.add_section()
        table.add_row("median", "", _speed(median(c.speedup for c in comparisons)))
    return table


def _speed(ratio: float) -> str:
    colour = "green" if ratio >= 1.02 else "yellow" if ratio > 0.98 else "red"
    return f"[bold {colour}]{ratio:.2f}x[/]"


def verdict(
    comparisons: Sequence[Comparison], dtype: str, temperature: float
) -> list[str]:
    """Sentences for the end of a demo: speed first, then exactness."""
    lines = [_speed_sentence(comparisons)]
    repeated = median(c.plain[0].repeated for c in comparisons)
    if repeated > LOOPING:
        lines.append(
            f"The model repeats itself: {repeated:.0%} of the 4-grams in its texts "
            "occurred before, and loops are easy to predict. "
            + ("" if temperature else "Try --temperature 0.7.")
        )
    return [*lines, _exactness(comparisons, dtype, temperature)]


def _speed_sentence(comparisons: Sequence[Comparison]) -> str:
    speedup = median(c.speedup for c in comparisons)
    ppd = [c.ppd[0] for c in comparisons]
    # The first step of a text reads the prompt.
    decode = [step for g in ppd for step in g.steps[1:]]
    length = sum(len(step.ids) for step in decode) / len(decode) if decode else 1.0
    plain_ms = _step_ms([g for c in comparisons for g in c.plain])
    ppd_ms = _step_ms([g for c in comparisons for g in c.ppd])
    steps = (
        f"{length:.2f} tokens per step, and a step took {ppd_ms:.1f} ms instead of "
        f"{plain_ms:.1f} ms"
    )
    if speedup >= 1.02:
        return f"PPD was {speedup:.2f}x as fast: {steps}."
    if speedup > 0.98:
        return f"PPD was no faster here ({speedup:.2f}x): {steps}."
    return (
        f"PPD was slower here ({speedup:.2f}x): {steps}. Draft tokens cost extra time "
        "if the machine has no computing power to spare, as with few CPU cores or a "
        "busy machine."
    )


def _exactness(
    comparisons: Sequence[Comparison], dtype: str, temperature: float
) -> str:
    if temperature > 0:
        return (
            f"At temperature {temperature:g} both sample from the same distribution, "
            "so the two texts need not be equal."
        )
    same = sum(c.first_difference is None for c in comparisons)
    if same == len(comparisons):
        tokens = sum(len(c.ppd[0].ids) for c in comparisons)
        return f"All {tokens:,} token ids are identical to plain vLLM's."
    reason = "In float32 they should all be: please report this."
    if dtype != "float32":
        reason = (
            f"In {dtype} a step of several rows rounds a little differently from a "
            "step of one row, which can decide between two tokens of almost the same "
            "probability; --dtype float32 avoids that."
        )
    return f"Token ids are identical for {same} of {len(comparisons)} prompts. {reason}"
