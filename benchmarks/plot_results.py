"""Draw a results file: speed against plain vLLM, with its spread.

    python benchmarks/plot_results.py benchmarks/results/NAME.json
    python benchmarks/plot_results.py benchmarks/results/NAME.json --out NAME.svg

One group of bars per batch size and one panel per temperature; a bar is the median
over rounds, its line reaches from the slowest to the fastest round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from result_file import read_results

COLOURS = {"ppd": "#2a9d8f", "ngram": "#e9a23b", "fixed": "#8a8d91"}
LABELS = {"ppd": "PPD", "ngram": "n-gram", "fixed": "PPD, not learning"}


def compared(results: dict[str, Any]) -> list[str]:
    """Decoders that have a ratio, other than the baseline itself.

    Raises ValueError when there are none.
    """
    found = [
        name
        for name, measured in results["cells"][0]["decoders"].items()
        if name != "plain" and "ratio" in measured
    ]
    if not found:
        raise ValueError("the results compare nothing with plain vLLM")
    return found


def caption(results: dict[str, Any]) -> str:
    """The conditions in one line."""
    engine = next(iter(results["engines"].values()))
    settings = results["settings"]
    device = engine["device"]
    rounds = len(next(iter(results["cells"][0]["decoders"].values()))["rounds"])
    if device == "cpu":
        device = (
            f"{results['environment']['cpu']}, cores used: {len(engine['worker_cpus'])}"
        )
    return (
        f"{settings['model']}, {engine['dtype']}, {device}, vLLM {engine['vllm']}; "
        f"{settings['num_prompts']} prompts of {settings['prompt_tokens']} tokens, "
        f"{settings['max_tokens']} new; {rounds} rounds"
    )


def draw(results: dict[str, Any], out: Path) -> None:
    """Write the picture; the suffix of `out` says whether PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decoders = compared(results)
    temperatures = sorted({cell["temperature"] for cell in results["cells"]})
    figure, panels = pyplot.subplots(
        1,
        len(temperatures),
        figsize=(1 + 3 * len(temperatures), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    width = 0.8 / len(decoders)
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        cells = [c for c in results["cells"] if c["temperature"] == temperature]
        for place, name in enumerate(decoders):
            found = [cell["decoders"][name]["ratio"] for cell in cells]
            medians = [ratio["median"] for ratio in found]
            spread = [
                [ratio["median"] - ratio["min"] for ratio in found],
                [ratio["max"] - ratio["median"] for ratio in found],
            ]
            at = [
                i + (place - (len(decoders) - 1) / 2) * width for i in range(len(cells))
            ]
            bars = panel.bar(
                at,
                medians,
                0.9 * width,
                yerr=spread,
                capsize=3,
                color=COLOURS.get(name),
                label=LABELS.get(name, name),
            )
            panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
        panel.margins(y=0.12)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(cells)), [f"batch {c['batch']}" for c in cells])
        panel.set_title("greedy" if not temperature else f"temperature {temperature:g}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("speed against plain vLLM")
    panels[0][-1].legend(frameon=False)
    figure.supxlabel(caption(results), fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a file in benchmarks/results")
    parser.add_argument("--out", type=Path, help=".png or .svg (default: beside it)")
    args = parser.parse_args(argv)
    out = args.out or args.results.with_suffix(".png")
    if out.suffix not in (".png", ".svg"):
        parser.error(f"--out is {out}; expected a name ending in .png or .svg")
    try:
        draw(read_results(args.results), out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
