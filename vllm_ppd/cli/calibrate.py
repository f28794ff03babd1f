"""vllm-ppd calibrate: measure acceptance on held-out text and choose the draft trees.

    vllm-ppd calibrate PATH --model MODEL --data HELD_OUT.jsonl

Writes into PATH: acceptance.json (acceptance probabilities), bigram.safetensors (the
bigram table) and trees.json (the tree menus for vLLM's two model runners).
"""

from __future__ import annotations

import argparse
from typing import Any

from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.cli.train import add_settings

_REPORTED = 10  # the wider of the two rates printed, as in the paper
_TEXTS = {
    "points": "Number of positions to sample (default {}; fewer if the data are "
    "short).",
    "points_per_prompt": "Positions to sample per generated text",
    "temperature": "Sampling temperature for the generated text (0 = greedy)",
    "ranks": "Draft tokens to rank at each distance",
    "prompt_length": "Tokens of each prompt, which are taken from the data",
    "continuation": "Tokens to generate after each prompt",
    "batch_size": "Prompts to continue at once",
    "dtype": "As in vllm-ppd train",
    "bigram_entries": "Next tokens per token in the bigram table (0 = no table)",
    "bigram_tokens": "Tokens of the data to count the bigram table on, at most half",
    "variable_rows": "Most rows of a tree where every request's tree has its own size "
    "(V1 model runner)",
    "fixed_rows": "Most rows of a tree where all trees of a step are padded to one "
    "size (V2 model runner)",
    "seed": "Seed of prompts, positions and sampling",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-ppd calibrate`."""
    add = parser.add_argument
    add("path", help="Folder or hub id of the prompt tokens.")
    add("--model", required=True, help="Folder or hub id of the model they belong to.")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="TEXT",
        help='Held-out text: .jsonl files with {"text": ...} or {"messages": [...]} on '
        "every line, plain text files, or Hugging Face data sets.",
    )
    add("--out", metavar="FOLDER", help="Folder for the three files (default: PATH).")
    add("--overwrite", action="store_true", help="Replace existing files.")
    add("--cpu", action="store_true", help="Use no GPU.")
    add("--quiet", action="store_true", help="Show no progress.")
    group = parser.add_argument_group("measuring")
    flags = {"points": ["--points", "--tokens"], "continuation": ["--continue"]}
    add_settings(group, CalibrationSettings, _TEXTS, **flags)


def run(args: argparse.Namespace) -> int:
    """Calibrate as the flags say. Raises ValueError subclasses for unusable input."""
    # Here, because transformers takes seconds to import.
    from transformers.utils.logging import disable_progress_bar

    from vllm_ppd.calibrate.job import CalibrationJob

    # Its bar for loading weights would be the longest output of a short run.
    disable_progress_bar()
    result, folder = CalibrationJob(
        path=args.path,
        model=args.model,
        data=args.data,
        settings=CalibrationSettings(**{name: getattr(args, name) for name in _TEXTS}),
        out=args.out,
        overwrite=args.overwrite,
        cpu=args.cpu,
        quiet=args.quiet,
    ).run()
    _report(result)
    print(f"The calibration is in {folder}.")
    return 0


def _report(result: Any) -> None:
    source, marginal = result.acceptance.source, result.acceptance.marginal
    points, asked = source["points"], source["settings"]["points"]
    print(
        f"{points} positions of {source['prompts']} prompts, {source['seconds']:.0f} s"
    )
    if points < asked:
        print(
            f"The data are too short for {asked} positions; more data, a shorter "
            "--prompt-length or a higher --points-per-prompt gives more."
        )
    wide = min(_REPORTED, marginal.shape[1])
    print(f"distance   top-1 (95 %)    top-{wide}")
    rows = zip(marginal, source["top1_half_width_95"], strict=True)
    for distance, (rates, width) in enumerate(rows, start=1):
        top = rates[:wide].sum()
        print(f"  +{distance}      {rates[0]:.3f} ± {width:.3f}    {top:.3f}")
    print("draft length   expected acceptance length")
    for entry in result.variable_rows.entries:
        print(f"  {entry.num_draft_tokens:10}   {entry.acceptance_length:.2f}")
