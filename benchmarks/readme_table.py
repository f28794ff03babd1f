"""Write the README's result table from committed results of compare_decoders.py.

python benchmarks/readme_table.py            # rewrites README.md
python benchmarks/readme_table.py --check    # fails if README.md is out of date
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from results import ROOT, markdown, read_results

RESULTS = ROOT / "benchmarks" / "results" / "loads_demo.json"
TITLES = {"ppd": "PPD", "ngram": "n-gram"}
BEGIN, END = "<!-- results: benchmarks/readme_table.py -->", "<!-- end -->"


def section(results: dict[str, Any]) -> str:
    """A row per number of requests, a column per decoder and temperature."""
    cells = {
        (cell["batch"], cell["temperature"], name): figures
        for cell in results["cells"]
        for name, figures in cell["decoders"].items()
    }
    measured = sorted({(name, t) for _, t, name in cells if name in TITLES})
    columns = sorted(measured, key=lambda pair: list(TITLES).index(pair[0]))
    rows = [["requests"]]
    for name, t in columns:
        rows[0].append(f"{TITLES[name]}, {f'temperature {t:g}' if t else 'greedy'}")
    for batch in sorted({batch for batch, _, _ in cells}):
        row = [str(batch)]
        for decoder, temperature in columns:
            figures = cells.get((batch, temperature, decoder), {})
            ratio = figures.get("ratio")
            text = f"{ratio['median']:.2f}x" if ratio else "-"
            if ratio and decoder == "ppd":
                length = figures["acceptance_length"]["median"]
                text = f"**{text}** ({length:.2f})"
            row.append(text)
        rows.append(row)
    machine, engine = results["environment"], results["engines"]["ppd"]
    note = (
        "Tokens per second relative to plain vLLM, and PPD's mean acceptance length in "
        f"brackets: {results['settings']['model']}, {machine['cpu']}, "
        f"{machine['usable_cores']} cores, vLLM {engine['vllm']}, {engine['dtype']}; "
        "engines take turns, medians over rounds."
    )
    return "\n".join([BEGIN, markdown(rows), "", note, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no line {BEGIN!r} with {END!r} after it")
    shown = section(read_results(RESULTS, "compare_decoders"))
    new = pattern.sub(lambda _: shown, text)
    if args.check and new != text:
        raise SystemExit("README.md does not show the committed results")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
