"""vllm-ppd train: train prompt tokens for a frozen model.

    vllm-ppd train --model MODEL --data TEXT.jsonl --out DIR --minutes 15

Several GPUs: accelerate launch -m vllm_ppd.cli.train --model ... (same flags).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any, get_args

from vllm_ppd.train.settings import (
    DTYPES,
    RATE_STEPS,
    TOKENS_PER_UPDATE,
    Distillation,
    LossKind,
    TrainSettings,
)

_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(TrainSettings)
    # These are made of flags of other names.
    if field.name not in ("distillation", "quantization", "rate_steps")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `vllm-ppd train`."""

    def setting(group: Any, name: str, kind: Any, text: str, **more: Any) -> None:
        flag = "--" + name.replace("_", "-")
        default = _DEFAULTS[name]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(
            flag, dest=name, type=kind, default=default, help=text + shown, **more
        )

    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model", required=True, help="folder or hub id of the model; it stays frozen"
    )
    group.add_argument(
        "--model-name",
        help="name of the model to record (default: hub id or folder name)",
    )
    group.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="TEXT",
        help='training text: .jsonl with {"text": ...} or {"messages": [...]} a line, '
        "plain text files, or Hugging Face data sets (a folder or a hub id, as "
        "NAME:CONFIGURATION@SPLIT)",
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="text to measure accuracy on (default: the end of the training text)",
    )
    setting(group, "max_tokens", int, "leave training text beyond this unread")
    group.add_argument(
        "--self-distill",
        type=int,
        metavar="N",
        help="train on N texts that the model writes itself, going on from pieces of "
        "the data; they are kept in the output folder",
    )
    distillation = {f.name: f.default for f in dataclasses.fields(Distillation)}
    for flag, name, text in (
        ("prompt", "prompt_length", "tokens of the data that each goes on from"),
        ("temperature", "temperature", "of their sampling; 0 is greedy"),
        ("batch-size", "batch_size", "texts written at once"),
    ):
        default: Any = distillation[name]
        group.add_argument(
            f"--self-distill-{flag}",
            dest=f"distill_{name}",
            type=type(default),
            default=default,
            help=f"{text} (default: {default})",
        )

    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, help="folder for the prompt tokens")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the folder's checkpoint if there is one",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the prompt tokens or the checkpoint that the folder has",
    )

    group = parser.add_argument_group("budget (steps or minutes)")
    setting(group, "steps", int, "optimiser steps")
    setting(group, "minutes", float, "minutes of training, evaluations included")

    setting(
        group,
        "patience",
        int,
        "stop after so many held-out evaluations without a better one, and keep the "
        "best (default: go on to the end, and keep the last)",
    )

    group = parser.add_argument_group("prompt tokens")
    setting(group, "num_prompt_tokens", int, "tokens guessed beyond the next one")
    setting(group, "num_ept", int, "ensemble members per prompt token")
    setting(group, "init", str, "text, vocabulary, or a prompt-token folder")

    group = parser.add_argument_group("optimisation")
    setting(group, "length", int, "tokens per training sequence")
    setting(group, "batch_size", int, "sequences per pass and process")
    setting(group, "points", int, "insertion points per sequence and step")
    setting(
        group,
        "updates",
        int,
        "steps per pass of a batch through the frozen model (default: one for every "
        f"{TOKENS_PER_UPDATE} tokens of a sequence)",
    )
    setting(
        group,
        "learning_rate",
        float,
        "AdamW's peak, decayed by a cosine (default: twice the root mean square of "
        f"the model's embeddings, and less in runs of under {RATE_STEPS} steps)",
    )
    setting(group, "alpha", float, "distance i counts alpha^(i-1)")
    kinds = get_args(LossKind)
    setting(group, "loss", str, "target: the model or the text", choices=kinds)
    setting(group, "dtype", str, "number format of the model", choices=DTYPES)
    group.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="quantise the frozen model (NF4; needs a GPU and bitsandbytes)",
    )
    group.add_argument(
        "--attention",
        choices=("auto", "plain", "flex"),
        default="auto",
        help="of the prompt rows: flex (FlexAttention, on a GPU), plain, or flex where "
        "it can be (default: auto)",
    )
    setting(group, "seed", int, "of data order, insertion points and start")
    group.add_argument("--cpu", action="store_true", help="use no GPU")

    group = parser.add_argument_group("reporting")
    group.add_argument(
        "--evaluations",
        type=int,
        default=8,
        help="held-out evaluations during the run (default: 8)",
    )
    group.add_argument(
        "--evaluation-sequences",
        type=int,
        default=64,
        help="held-out sequences per evaluation (default: 64)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        help="steps between checkpoints (default: 100)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Train as the flags say; 0 when done, 130 when stopped with a checkpoint saved.

    Raises ValueError subclasses for unusable input.
    """
    # Here, because accelerate and transformers take seconds to import.
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from vllm_ppd.train.job import TrainJob
    from vllm_ppd.train.trainer import Interrupted, Schedule

    # Its bar for loading weights would be the longest output of a short run.
    disable_progress_bar()
    try:
        job = TrainJob(
            model=args.model,
            data=args.data,
            out=args.out,
            settings=_settings(args),
            held_out=args.held_out,
            model_name=args.model_name,
            resume=args.resume,
            overwrite=args.overwrite,
            cpu=args.cpu,
            attention=args.attention,
            schedule=Schedule(
                evaluations=args.evaluations,
                evaluation_sequences=args.evaluation_sequences,
                checkpoint_every=args.checkpoint_every,
            ),
            quiet=args.quiet,
        )
        result = job.run()
    except Interrupted as stop:
        print(f"{stop}; continue with --resume", file=sys.stderr)
        return 130
    if PartialState().is_main_process:
        _report(args.out, result)
    return 0


def _settings(args: argparse.Namespace) -> TrainSettings:
    names = [field.name for field in dataclasses.fields(Distillation)]
    own = {name: getattr(args, f"distill_{name}", None) for name in names}
    distillation = None
    if args.self_distill is not None:
        distillation = Distillation(**{**own, "continuations": args.self_distill})
    return TrainSettings(
        **{name: getattr(args, name) for name in _DEFAULTS},
        quantization="4bit" if args.load_in_4bit else None,
        distillation=distillation,
    )


def _report(out: str, result: Any) -> None:
    last = result.held_out
    early = ", stopped early" if result.stopped_early else ""
    print(
        f"{result.steps} steps in {result.seconds:.0f} s{early}, "
        f"{result.positions_per_second:.0f} predictions/s; "
        f"prompt tokens are in {out}"
    )
    if last["step"] != result.steps:
        print(f"they are those of step {last['step']}, the best on held-out text")
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
