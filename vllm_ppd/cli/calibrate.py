"""vllm-ppd calibrate: measure how often prompt tokens guess right.

    vllm-ppd calibrate PATH --model MODEL --data HELD_OUT.jsonl

Writes into PATH what trees are chosen by: acceptance.json and its plot, the successor
table (bigram.safetensors) and acceptance.json, the chances with that table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from vllm_ppd.calibrate.settings import CalibrationSettings

_REPORTED = 10  # the wider of the two rates printed, as in the paper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-ppd calibrate`."""
    parser.add_argument("path", help="folder or hub id of prompt tokens")
    parser.add_argument(
        "--model", required=True, help="folder or hub id of the model they belong to"
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help='held-out text: .jsonl with {"text": ...} or {"messages": [...]} a line, '
        "or plain text files",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file for the table (default: acceptance.json in PATH); the plot goes "
        "beside it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    _add_settings(parser.add_argument_group("measuring"))


def _add_settings(group: Any) -> None:
    texts = {
        "points": "insertion points, as far as the text goes",
        "points_per_prompt": "insertion points per continuation",
        "temperature": "of the continuations; 0 is greedy",
        "ranks": "candidates per distance",
        "prompt_length": "tokens of text that the model continues",
        "continuation": "tokens that it writes after them",
        "batch_size": "prompts at once",
        "dtype": "number format of the model",
        "bigram": "next tokens listed per token in the bigram table, 0 for none",
        "bigram_tokens": "tokens of text that the table is made of",
        "seed": "of prompts, insertion points and sampling",
    }
    flags = {"points": ["--points", "--tokens"], "continuation": ["--continue"]}
    for field in dataclasses.fields(CalibrationSettings):
        group.add_argument(
            *flags.get(field.name, ["--" + field.name.replace("_", "-")]),
            dest=field.name,
            type=type(field.default),
            default=field.default,
            help=f"{texts[field.name]} (default: {field.default})",
        )


def run(args: argparse.Namespace) -> int:
    """Calibrate as the flags say. Raises ValueError subclasses for unusable input."""
    # Here, because transformers takes seconds to import.
    from transformers.utils.logging import disable_progress_bar

    from vllm_ppd.calibrate.job import CalibrationJob

    # Its bar for loading weights would be the longest output of a short run.
    disable_progress_bar()
    names = [field.name for field in dataclasses.fields(CalibrationSettings)]
    stats, table, plot = CalibrationJob(
        path=args.path,
        model=args.model,
        data=args.data,
        settings=CalibrationSettings(**{name: getattr(args, name) for name in names}),
        out=args.out,
        overwrite=args.overwrite,
        cpu=args.cpu,
        quiet=args.quiet,
    ).run()
    _report(stats)
    if plot is None:
        print(f"The table is in {table}; no plot, because matplotlib is not installed.")
    else:
        print(f"The table is in {table}, its plot in {plot}.")
    return 0


def _report(stats: Any) -> None:
    source = stats.source
    points, asked = source["points"], source["settings"]["points"]
    print(f"{points} points of {source['prompts']} prompts, {source['seconds']:.0f} s")
    if points < asked:
        print(
            f"The text has no prompts for all {asked} points; more text, a shorter "
            "--prompt-length or a higher --points-per-prompt gives more."
        )
    wide = min(_REPORTED, stats.num_ranks)
    columns = zip(
        stats.acceptance,
        source["top1_half_width_95"],
        source["calibration_error"],
        strict=True,
    )
    print(f"distance   top-1 (95 %)    top-{wide}   probabilities off by")
    for distance, (rates, width, error) in enumerate(columns, start=1):
        print(
            f"  +{distance}      {rates[0]:.3f} ± {width:.3f}"
            f"    {rates[:wide].sum():.3f}    {error:.3f}"
        )


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    try:
        sys.exit(run(_parser.parse_args()))
    except ValueError as _error:
        sys.exit(f"error: {_error}")
