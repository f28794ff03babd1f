"""Write the README's result table from committed results.

python benchmarks/readme_table.py            # rewrites README.md
python benchmarks/readme_table.py --check    # fails if README.md is out of date
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from stats import summarise

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: benchmarks/readme_table.py -->", "<!-- end -->"


def spread(figure: dict[str, float], digits: int = 2) -> str:
    return "{median:.{d}f}x ({min:.{d}f}-{max:.{d}f})".format(**figure, d=digits)


def pooled(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """PPD's figures over all rounds of one condition, from several runs: each starts
    its engines anew, and one start is luckier than another."""
    rounds = {
        name: [one for cell in cells for one in cell["decoders"][name]["rounds"]]
        for name in ("plain", "ppd")
    }
    return summarise(rounds)["ppd"]


def decoders(compared: dict[str, Any], loads: list[dict[str, Any]]) -> list[str]:
    """One row per number of requests, one column per temperature and decoder.

    Args:
        compared: a run of all decoders; what `loads` has not measured is from here.
        loads: runs of plain vLLM and PPD.
    """
    cells: dict[tuple[int, float], dict[str, Any]] = {}
    for cell in compared["cells"]:
        cells[cell["batch"], cell["temperature"]] = dict(cell["decoders"])
    found: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for document in loads:
        for cell in document["cells"]:
            where = cell["batch"], cell["temperature"]
            found.setdefault(where, []).append(cell)
    for where, measured in found.items():
        cells.setdefault(where, {})["ppd"] = pooled(measured)
    temperatures = sorted({temperature for _, temperature in cells})
    names = ["greedy" if t == 0 else f"at {t:g}" for t in temperatures]
    lines = [
        "| requests at once | "
        + " | ".join(f"PPD {name}" for name in names)
        + " | "
        + " | ".join(f"n-gram {name}" for name in names)
        + " |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    for load in sorted({load for load, _ in cells}):
        row = [str(load)]
        for decoder in ("ppd", "ngram"):
            for temperature in temperatures:
                figures = cells.get((load, temperature), {}).get(decoder)
                if figures is None:
                    row.append("-")
                elif decoder == "ppd":
                    tokens = figures["tokens_per_step"]["median"]
                    row.append(f"**{spread(figures['ratio'])}**, {tokens:.2f}")
                else:
                    row.append(f"{figures['ratio']['median']:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def replayed(name: str, what: str) -> list[str]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    cell, rows = results["cells"][0], results["settings"]["rows"]
    plain, equal, ppd = (
        cell["decoders"][n] for n in ("plain x1", f"plain x{rows}", "ppd x1")
    )
    forward, other = ppd["parts_ms"]["forward"], equal["parts_ms"]["forward"]
    # Processes differ in how fast they run the very same matrices. Take the slower.
    step = ppd["step_ms"] - forward + max(forward, other)
    cautious = ppd["tokens_per_step"] * plain["step_ms"] / step
    return [
        f"- {what}: **{cautious:.2f}x** plain at one request "
        f"({ppd['tokens_per_step']:.2f} tokens per step of {rows} rows; a plain step "
        f"took {plain['step_ms']:.1f} ms, a PPD step {ppd['step_ms']:.1f} ms, with the "
        f"{rows}-row forward in {forward:.1f} ms that plain vLLM's process ran in "
        f"{other:.1f} ms: the figure counts the slower of the two; as measured it is "
        f"{spread(cell['ppd_speedup'])})."
    ]


def section() -> str:
    results = json.loads((RESULTS / "demo_model.json").read_text())
    # More numbers of requests, a run per temperature, without n-gram.
    loads = [
        json.loads(path.read_text()) for path in sorted(RESULTS.glob("loads_*.json"))
    ]
    counts: Counter[tuple[int, float]] = Counter()
    for document in loads:
        for cell in document["cells"]:
            where = cell["batch"], cell["temperature"]
            counts[where] += len(cell["decoders"]["ppd"]["rounds"])
    rounds = " to ".join(map(str, sorted({min(counts.values()), max(counts.values())})))
    machine = results["environment"]
    engine = results["engines"]["ppd"]
    settings = results["settings"]
    beside = len(results["cells"][0]["decoders"]["ngram"]["rounds"])
    tokens, ratio = settings["max_tokens"], settings["range_ratio"]
    least, most = round((1 - ratio) * tokens), round((1 + ratio) * tokens)
    lines = [
        "Tokens per second against plain vLLM, and PPD's tokens per step, on the demo "
        "model "
        f"({machine['cpu']}, {machine['usable_cores']} cores; vLLM {engine['vllm']}, "
        f"{engine['dtype']}, {'eager' if engine['eager'] else 'compiled'}; held-out "
        f"Python sources, {least} to {most} tokens each; engines take turns; medians "
        f"of {rounds} rounds, slowest and fastest in brackets; n-gram from a run "
        f"beside PPD, {beside} rounds):",
        "",
        *decoders(results, loads),
        "",
        *replayed(
            "step_cost_100m_replay",
            "A random model of 100 M parameters, guesses accepted as published for "
            "Vicuna-7B",
        ),
    ]
    return "\n".join([BEGIN, *lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    new = pattern.sub(lambda _: section(), text)
    if args.check:
        if new != text:
            raise SystemExit("README.md does not show the committed results")
    elif new == text and not pattern.search(text):
        raise SystemExit(f"README.md has no line {BEGIN!r}")
    else:
        readme.write_text(new)


if __name__ == "__main__":
    main()
