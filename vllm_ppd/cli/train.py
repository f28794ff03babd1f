"""vllm-ppd train: train prompt tokens for a frozen model.

    vllm-ppd train --model MODEL --data TEXT.jsonl --out DIR --minutes 15

Several GPUs: accelerate launch -m vllm_ppd.cli.train --model ... (same flags).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, get_args

from vllm_ppd.train.settings import (
    DTYPES,
    RATE_STEPS,
    TOKENS_PER_UPDATE,
    LossKind,
    TrainSettings,
)

_CHOICES = {"loss": get_args(LossKind), "dtype": DTYPES}
# A text with a full stop has no default to add.
_TEXTS = {
    "budget (steps or minutes)": {
        "steps": "Number of optimizer steps.",
        "minutes": "Minutes of training, evaluations included.",
    },
    "prompt tokens": {
        "num_prompt_tokens": "Tokens predicted beyond the next one",
        "num_ept": "Ensemble members per prompt token",
        "init": "Initial embeddings: text or vocabulary (those of tokens drawn from "
        "it), or a folder of prompt tokens",
    },
    "optimization": {
        "max_tokens": "Largest number of training tokens to read",
        "length": "Tokens per training sequence",
        "batch_size": "Sequences per forward pass and process",
        "points": "Insertion points per sequence and step",
        "updates": "Optimizer steps per forward pass of the frozen model (default: one "
        f"for every {TOKENS_PER_UPDATE} tokens of a sequence).",
        "learning_rate": "Peak learning rate of AdamW, decayed by a cosine (default: "
        "twice the root mean square of the model's embeddings, less in runs of under "
        f"{RATE_STEPS} steps).",
        "alpha": "Weight of distance i in the loss is alpha^(i-1)",
        "loss": "Target: kl (the model's distribution) or labels (the text)",
        "dtype": "Number format of the model; auto is float32 on a CPU without "
        "bfloat16 instructions, else the checkpoint's own",
        "seed": "Seed of data order, insertion points and initial embeddings",
    },
}


def add_settings(
    group: Any, settings: type[Any], texts: Mapping[str, str], **flags: list[str]
) -> None:
    """A flag for each text's setting, or several `flags`; {} stands for the default."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name, text in texts.items():
        default, kind = fields[name].default, str(fields[name].type).split()[0]
        text += "" if text[-1] == "." else " (default: {})."
        group.add_argument(
            *flags.get(name, ["--" + name.replace("_", "-")]),
            dest=name,
            type={"int": int, "float": float}.get(kind, str),
            choices=_CHOICES.get(name),
            default=default,
            help=text.format(default),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-ppd train`."""
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add(
        "--model", required=True, help="Folder or hub id of the model; it stays frozen."
    )
    add("--model-name", help="Model name to record (default: hub id or folder name).")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="TEXT",
        help='Training text: .jsonl files with {"text": ...} or {"messages": [...]} on '
        "every line, plain text files, or Hugging Face data sets (a folder or a hub "
        "id, as NAME:CONFIGURATION@SPLIT).",
    )
    text = "Text to measure accuracy on (default: the end of the training text)."
    add("--held-out", nargs="+", default=[], metavar="TEXT", help=text)
    add(
        "--self-distill",
        metavar="PROMPTS",
        help="Train on the model's own answers to the prompts of a data set or .jsonl "
        'file: {"prompt": ...}, {"turns": [...]} or {"messages": [...]} on every line. '
        "A number: to so many prompts that a chat model writes itself, as users would. "
        "A vLLM engine writes them into the output folder; a stopped run goes on.",
    )
    text = "Most tokens of such an answer (default: 256)."
    add("--self-distill-tokens", type=int, default=256, help=text)

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--out", required=True, help="Folder for the prompt tokens.")
    text = "Continue from the checkpoint in the output folder, if it has one."
    add("--resume", action="store_true", help=text)
    text = "Replace the prompt tokens or the checkpoint in the output folder."
    add("--overwrite", action="store_true", help=text)

    for title, texts in _TEXTS.items():
        group = parser.add_argument_group(title)
        add_settings(group, TrainSettings, texts)
    group.add_argument("--cpu", action="store_true", help="Use no GPU.")

    group = parser.add_argument_group("reporting")
    for flag, default, text in (
        ("--evaluations", 8, "Number of held-out evaluations during the run"),
        (
            "--evaluation-sequences",
            64,
            "Held-out sequences per evaluation; fewer where evaluations would take "
            "more than a tenth of --minutes",
        ),
        ("--checkpoint-every", 100, "Steps between checkpoints"),
    ):
        text = f"{text} (default: {default})."
        group.add_argument(flag, type=int, default=default, help=text)
    group.add_argument("--quiet", action="store_true", help="Show no progress.")


def run(args: argparse.Namespace) -> int:
    """Train as the flags say; 0 when done, 130 when stopped with a checkpoint saved.

    Raises ValueError subclasses for unusable input.
    """
    # Here, because accelerate and transformers take seconds to import.
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from vllm_ppd.cli.self_distillation import self_distill
    from vllm_ppd.train.job import TrainJob
    from vllm_ppd.train.trainer import Interrupted, Schedule

    # Its bar for loading weights would be the longest output of a short run.
    disable_progress_bar()
    if not (args.data or args.self_distill):
        raise ValueError("there is no text to train on; give --data or --self-distill")
    job = TrainJob(
        model=args.model,
        data=args.data,
        out=args.out,
        settings=TrainSettings(
            **{name: getattr(args, name) for texts in _TEXTS.values() for name in texts}
        ),
        held_out=args.held_out,
        model_name=args.model_name,
        resume=args.resume,
        overwrite=args.overwrite,
        cpu=args.cpu,
        schedule=Schedule(
            evaluations=args.evaluations,
            evaluation_sequences=args.evaluation_sequences,
            checkpoint_every=args.checkpoint_every,
        ),
        quiet=args.quiet,
    )
    if args.self_distill:
        job.check_folder()
        job = dataclasses.replace(job, data=[*args.data, self_distill(args)])
    try:
        result = job.run()
    except Interrupted as stop:
        print(f"{stop}; continue with --resume", file=sys.stderr)
        return 130
    if PartialState().is_main_process:
        _report(args.out, result)
    return 0


def _report(out: str, result: Any) -> None:
    last = result.history[-1]
    print(
        f"{result.steps} steps in {result.seconds:.0f} s, "
        f"{result.positions_per_second:.0f} positions/s; prompt tokens are in {out}"
    )
    print("held-out accuracy            top-1   top-10")
    for name, label in (
        ("model", "the model's argmax"),
        ("greedy", "... on its own path"),
        ("true", "the text"),
    ):
        rows = zip(last[f"{name}_top1"], last[f"{name}_top10"], strict=True)
        for distance, (top1, top10) in enumerate(rows, start=1):
            print(f"  {label:19} +{distance}   {top1:6.3f}   {top10:6.3f}")


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    try:
        sys.exit(run(_parser.parse_args()))
    except ValueError as _error:
        sys.exit(f"error: {_error}")
