"""Write the README's result table from committed results of compare_decoders.py.

python benchmarks/readme_table.py            # rewrites README.md
python benchmarks/readme_table.py --check    # fails if README.md is out of date
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from results import ROOT, markdown, read_results

RESULTS = [ROOT / "benchmarks" / "results" / "parity_demo.json"]
BEGIN, END = "<!-- results: benchmarks/readme_table.py -->", "<!-- end -->"


def section(documents: list[dict[str, Any]]) -> str:
    """A row per number of requests, a column per decoder and temperature."""
    cells = {
        (cell["batch"], cell["temperature"], name): figures
        for document in documents
        for cell in document["cells"]
        for name, figures in cell["decoders"].items()
    }
    temperatures = sorted({temperature for _, temperature, _ in cells})
    names = {0.0: "greedy"}
    measured = {decoder for _, _, decoder in cells}
    columns = [
        (decoder, temperature)
        for decoder in ("ppd", "ngram")
        if decoder in measured
        for temperature in temperatures
    ]
    titles = {"ppd": "PPD", "ngram": "n-gram"}
    rows = [["requests"]]
    rows[0] += [
        f"{titles[d]}, {names.get(t, f'temperature {t:g}')}" for d, t in columns
    ]
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
    first = documents[0]
    machine, engine = first["environment"], first["engines"]["ppd"]
    note = (
        "Tokens per second relative to plain vLLM, and PPD's mean acceptance length in "
        f"brackets: {first['settings']['model']}, {machine['cpu']}, "
        f"{machine['usable_cores']} cores, vLLM {engine['vllm']}, {engine['dtype']}; "
        "engines take turns, medians over rounds."
    )
    return "\n".join([BEGIN, markdown(rows), "", note, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, nargs="+", default=RESULTS)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no line {BEGIN!r} with {END!r} after it")
    documents = [read_results(path, "compare_decoders") for path in args.results]
    new = pattern.sub(lambda _: section(documents), text)
    if args.check and new != text:
        raise SystemExit("README.md does not show the committed results")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
