"""Write the page's tables from the committed results.

python -m benchmarks.ablations.page            # rewrites README.md beside this file
python -m benchmarks.ablations.page --check    # fails if it is out of date
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.pages import ResultsPage

from .document import read_document, values

__all__ = ["PAGE"]


def rates(seeds: Sequence[Sequence[float]]) -> str:
    """Medians over seeds, one per distance: `.310 .134`."""
    columns = zip(*seeds, strict=True)
    return " ".join(f"{median(column):.3f}".removeprefix("0") for column in columns)


def spread(seeds: Sequence[float]) -> str:
    """The median, and the extremes where there is more than one seed."""
    shown = f"{median(seeds):.2f}"
    if len(seeds) > 1:
        shown += f" ({min(seeds):.2f}-{max(seeds):.2f})"
    return shown


def table_lines(results: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """One Markdown table: a row per run."""
    rows = [str(count) for count in results["settings"]["examination"]["rows"]]
    head = [
        table["variable"],
        "top-1 at distance 1, 2, ...",
        "top-10",
        *(f"tokens per step, {count} rows" for count in rows),
        "text gone through, tokens",
        "predictions/s",
        "parameters",
        "bytes",
    ]
    lines = [
        f"### {table['title']}",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in table["rows"]:

        def of(*keys: str, run: str = row["run"]) -> list[Any]:
            return values(results, run, *keys)

        cells = [
            row["label"],
            rates(of("acceptance", "top1")),
            rates(of("acceptance", "top10")),
            *(spread(of("rows", count, "walked_tau")) for count in rows),
            f"{median(of('cost', 'tokens')):,.0f}",
            f"{median(of('cost', 'positions_per_second')):,.0f}",
            f"{of('cost', 'parameters')[0]:,}",
            f"{of('cost', 'bytes')[0]:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def conditions(results: dict[str, Any]) -> list[str]:
    machine, settings = results["environment"], results["settings"]
    examined = settings["examination"]
    widths = [
        width
        for run in results["runs"]
        for seed in values(results, run, "acceptance", "top1_half_width_95")
        for width in seed
    ]
    seeds = settings["seeds"]
    return [
        f"{settings['model']} on {machine['cpu']}, {settings['threads']} "
        f"thread{'s' * (settings['threads'] > 1)}; {settings['seconds_per_run']:g} s "
        f"of training per run, {seeds} seed{'s' * (seeds > 1)}; commit "
        f"{(machine['git']['commit'] or 'unknown')[:7]}. "
        f"Accuracy and tokens per step are those of the model's own "
        f"{'greedy' if not examined['temperature'] else 'sampled'} continuations of "
        f"{examined['prompts']} held-out texts, the same for every run; 95 % intervals "
        f"of the top-1 rates reach {max(widths):.3f} to either side at most.",
    ]


def lines(results: dict[str, Any]) -> list[str]:
    """What stands in the page's section."""
    found = conditions(results)
    for table in results["tables"]:
        found += ["", *table_lines(results, table)]
    return found


PAGE = ResultsPage.beside(__file__, "ablations", read_document, lines)

if __name__ == "__main__":
    raise SystemExit(PAGE.command(__doc__ or ""))
