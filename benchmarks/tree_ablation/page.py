"""Write the page's tables from the committed results.

python -m benchmarks.tree_ablation.page            # rewrites README.md beside this file
python -m benchmarks.tree_ablation.page --check    # fails if it is out of date
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import ResultsPage

from .document import cells_of, read_document
from .prediction import DEMO

__all__ = ["PAGE", "source_name"]


def source_name(bigram: bool, ngram: bool) -> str:
    """What guesses are made from, in words."""
    more = ["bigram table"] * bigram + ["earlier matches"] * ngram
    return " + ".join(["prompt rows", *more])


def decoding_name(temperature: str) -> str:
    return "greedy" if temperature == "0" else f"temperature {temperature}"


def unique(cells: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """The different values of some keys, in order of appearance."""
    return list(dict.fromkeys(tuple(cell[key] for key in keys) for cell in cells))


def predicted_lines(results: Mapping[str, Any], statistics: str) -> list[str]:
    """One table per model: a row per source and kind, a column per rows."""
    cells = cells_of(results["predicted"], statistics=statistics)
    rows = [count for (count,) in unique(cells, "rows")]
    lines = [
        "| guesses from | trees | " + " | ".join(f"{n} rows" for n in rows) + " |",
        "|---" * (2 + len(rows)) + "|",
    ]
    for bigram, ngram, kind in unique(cells, "bigram", "ngram", "kind"):
        found = cells_of(cells, bigram=bigram, ngram=ngram, kind=kind)
        taus = {cell["rows"]: f"{cell['tau']:.3f}" for cell in found}
        lines.append(
            f"| {source_name(bigram, ngram)} | {kind} | "
            + " | ".join(taus.get(count, "-") for count in rows)
            + " |"
        )
    return lines


def measured_lines(results: Mapping[str, Any]) -> list[str]:
    """A row per source, kind and rows, a column per temperature."""
    cells = results["measured"]
    temperatures = list(cells[0]["temperatures"])
    lines = [
        "| guesses from | trees | rows | predicted | "
        + " | ".join(decoding_name(t) for t in temperatures)
        + " |",
        "|---" * (4 + len(temperatures)) + "|",
    ]
    for cell in cells:
        figures = (cell["temperatures"][t] for t in temperatures)
        shown = (
            f"{f['tokens_per_step']:.3f} ± {f['half_width_95']:.3f}" for f in figures
        )
        lines.append(
            f"| {source_name(cell['bigram'], cell['ngram'])} | {cell['kind']} "
            f"| {cell['rows']} | {cell['predicted_tau']:.3f} | "
            + " | ".join(shown)
            + " |"
        )
    return lines


def chosen_lines(results: Mapping[str, Any]) -> list[str]:
    """A row per machine and load, a column per source: gain (tokens, rows)."""
    cells = results["chosen"]
    sources = unique(cells, "bigram", "ngram")
    lines = [
        "| machine | requests | " + " | ".join(source_name(*s) for s in sources) + " |",
        "|---" * (2 + len(sources)) + "|",
    ]
    for machine, requests in unique(cells, "machine", "requests"):
        shown = []
        for bigram, ngram in sources:
            found = cells_of(
                cells,
                machine=machine,
                requests=requests,
                bigram=bigram,
                ngram=ngram,
            )
            # Beyond the last tier everything is as in it: plain decoding.
            text = "plain"
            if found and found[0]["gain"] > 1:
                text = "{gain:.2f}x ({tau:.2f}, {mean_rows:.1f})".format(**found[0])
            shown.append(text)
        lines.append(f"| {machine} | {requests} | " + " | ".join(shown) + " |")
    return lines


def conditions(results: Mapping[str, Any]) -> list[str]:
    machine, settings = results["environment"], results["settings"]
    commit = (machine["git"]["commit"] or "unknown")[:7]
    lines = [f"{settings['model']}, {settings['prompts']}; commit {commit}."]
    if results["measured"]:
        lines.append(
            f"Measured with vLLM {settings['vllm']}, {settings['dtype']}: "
            f"{settings['num_prompts']} prompts of {settings['prompt_length']} tokens, "
            f"{settings['max_tokens']} new ones each; ± is half a 95 % interval."
        )
    return lines


def lines(results: Mapping[str, Any]) -> list[str]:
    """What stands in the page's section."""
    found = conditions(results)
    if results["measured"]:
        found += ["", "### Measured on the demo model: tokens per step", ""]
        found += measured_lines(results)
    for (statistics,) in unique(results["predicted"], "statistics"):
        whose = "the demo model's acceptance" if statistics == DEMO else statistics
        found += ["", f"### Predicted tokens per step: {whose}", ""]
        found += predicted_lines(results, statistics)
    if results["chosen"]:
        found += ["", "### Our trees at the size that a machine chooses", ""]
        found += ["Expected speed of plain decoding (tokens, rows per step).", ""]
        found += chosen_lines(results)
    return found


PAGE = ResultsPage.beside(__file__, "tree_ablation", read_document, lines)

if __name__ == "__main__":
    raise SystemExit(PAGE.command(__doc__ or ""))
