"""How much faster do many insertion points per sequence train than one?

    python -m benchmarks.train_speed --quick
    python -m benchmarks.train_speed --out benchmarks/results/train_speed.json

The paper inserts its prompt tokens at one place of each training sequence. Here the
same trainer does that (`points = 1`) and inserts at many places, in turn on the same
machine:

- speed: supervised predictions per second, for several numbers of points and two
  lengths of sequence, with equal text per batch, medians over rounds with their spread;
- quality over time: trainings of several durations from start to end (each with its
  own learning-rate schedule, as nobody stops in the middle of one), judged after their
  clock has stopped. One point per sequence gets the best of several learning rates and
  batch sizes for each length of sequence; many points get the trainer's defaults.
  These are short, and several seeds of them (`--seeds`) say how much is chance.

Finished trainings are kept in the work folder, and the same command goes on from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations.examination import Examination
from benchmarks.ablations.plan import Run
from benchmarks.ablations.progress import Progress
from benchmarks.ablations.runs import RunFolder
from benchmarks.ablations.workbench import Texts, Workbench
from benchmarks.environment import ROOT, environment_card, git_state, shown_path
from benchmarks.stats import Spread
from benchmarks.train_speed_curves import ROWS, compared, curve_of, quality
from benchmarks.train_speed_plot import draw
from vllm_ppd.files import write_json
from vllm_ppd.train.settings import RATE_STEPS, TrainSettings
from vllm_ppd.train.trainer import Interrupted

# Parts of --seconds. Many points get at most a fifth: the claim is a tenth.
ONE_SHARES = tuple(Fraction(1, n) for n in (16, 8, 4, 2, 1))
MANY_SHARES = tuple(Fraction(1, n) for n in (80, 40, 20, 10, 5))
TUNED_AT = Fraction(1, 4)
# Arguments that the results name.
SHOWN = ("batch_tokens", "batch_size", "points", "seconds", "threads", "seeds")
# Learning rate over the default, and sequences per batch.
ONE_CHOICES = ((0.5, 1), (0.25, 1), (0.125, 1), (0.25, 2), (0.125, 2), (0.0625, 2))


def choice(text: str) -> tuple[float, int]:
    """An argparse type: a learning rate over the default, and sequences per batch."""
    rate, batch = text.split(":")
    return float(rate), int(batch)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    corpus = ROOT / "build" / "demo_corpus" / "train.jsonl"
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder")
    add("--data", nargs="+", default=[str(corpus)], help="training text")
    held_out = ROOT / "demo_model" / "held_out.jsonl"
    add("--held-out", nargs="+", default=[str(held_out)], help="text to judge by")
    add("--max-tokens", type=int, default=4_000_000, help="leave further text unread")
    add("--batch-tokens", type=int, default=2048, help="text per step")
    own = TrainSettings(steps=1)
    add("--points", type=int, default=own.points, help="the many, in quality over time")
    add("--batch-size", type=int, default=own.batch_size, help="of many points")
    lengths = {"nargs": "+", "type": int, "default": [256, 1024]}
    add("--lengths", **lengths, help="of sequences, for quality over time")
    add("--seconds", type=float, default=120.0, help="longest one-point training")
    add("--seeds", type=int, default=1, help="of each training with many points")
    choices = {"nargs": "+", "type": choice, "default": ONE_CHOICES}
    shown = "for one point: learning rate over the default, and sequences per batch"
    add("--one-choices", **choices, metavar="RATE:BATCH", help=shown)
    add("--speed-points", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    add("--speed-lengths", **lengths)
    add("--speed-seconds", type=float, default=6.0, help="per measurement of speed")
    add("--rounds", type=int, default=3, help="measurements of each speed")
    add("--threads", type=int, default=1, help="of torch, on CPU")
    add("--work", type=Path, help="folder of trainings (default: build/train_speed)")
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--quick", action="store_true", help="tiny: does it run at all?")
    add("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    args.examination = {"rows": (ROWS,)}
    if args.quick:
        args.seconds, args.speed_seconds, args.rounds = 0.4, 0.05, 1
        args.max_tokens, args.speed_points = 50_000, [1, args.points]
        args.examination |= {"prompts": 4, "continuation": 16, "sequences": 2}
    name = "train_speed-quick" if args.quick else "train_speed"
    args.work = args.work or ROOT / "build" / name
    for flag in ("seconds", "speed_seconds", "rounds", "threads", "points", "seeds"):
        if not getattr(args, flag) > 0:
            shown = "--" + flag.replace("_", "-")
            parser.error(f"{shown} is {getattr(args, flag)}; expected above 0")
    if 1 not in args.speed_points:
        parser.error("--speed-points must have 1, which the others are compared with")
    return args


def batch_of(args: argparse.Namespace, length: int) -> int:
    """Sequences per batch, so that batches of all lengths have as much text."""
    return max(1, args.batch_tokens // length)


def measure_speeds(bench: Workbench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Predictions per second, a cell per length; numbers of points take turns."""
    cells = []
    for length in args.speed_lengths:
        # Closer together, most places of a sequence would be insertion points.
        counts = [n for n in args.speed_points if n <= max(1, length // 2)]
        rounds: dict[int, list[float]] = {count: [] for count in counts}
        for number in range(args.rounds + 1):
            for count, speeds in rounds.items():
                settings = TrainSettings(
                    # The first round warms up.
                    steps=None if number else 2,
                    minutes=args.speed_seconds / 60 if number else None,
                    points=count,
                    updates=1,
                    length=length,
                    batch_size=batch_of(args, length),
                    learning_rate=bench.learning_rate,
                )
                with tempfile.TemporaryDirectory() as folder:
                    done = bench.train(settings, Path(folder), identity={})
                if number:
                    speeds.append(done.positions_per_second)
        cells.append(speed_cell(length, batch_of(args, length), rounds))
    return cells


def speed_cell(
    length: int, batch: int, rounds: Mapping[int, Sequence[float]]
) -> dict[str, Any]:
    """rounds: points per sequence -> predictions per second, round by round."""
    one = rounds[1]
    return {
        "length": length,
        "batch_size": batch,
        "points": {
            str(count): {
                "predictions_per_s": Spread.of(speeds).to_dict(1),
                "ratio": Spread.of(
                    [a / b for a, b in zip(speeds, one, strict=True)]
                ).to_dict(2),
                "rounds": [round(speed, 1) for speed in speeds],
            }
            for count, speeds in rounds.items()
        },
    }


def one_point(share: Fraction, factor: float, batch_size: int) -> Run:
    part = f"{share.numerator}_{share.denominator}"
    name = f"one,rate={factor:g},batch={batch_size},{part}"
    settings = {"points": 1, "updates": 1, "batch_size": batch_size}
    return Run(name, settings, share=share, rate_factor=factor)


def many_points(share: Fraction, **settings: int) -> Run:
    shown = ",".join(f"{name}={value}" for name, value in settings.items())
    name = f"many,{shown},{share.numerator}_{share.denominator}"
    return Run(name, {**settings, "rate_steps": RATE_STEPS}, share=share)


def measure_quality(
    bench: Workbench, args: argparse.Namespace, examination: Examination, length: int
) -> dict[str, Any]:
    """Both curves for sequences of `length` tokens, and the comparison."""
    folder = RunFolder(
        args.work / f"length={length}",
        {
            "seconds": args.seconds,
            "examination": examination.to_dict(),
            "base_model": dataclasses.asdict(bench.base),
            "data_sha256": bench.data_sha256,
            "text_tokens": bench.text.tokens.numel(),
            "batch_tokens": args.batch_tokens,
            "length": length,
            "threads": args.threads,
        },
    )
    folder.open()
    own: dict[str, Any] = {
        "points": args.points,
        "batch_size": args.batch_size,
        "updates": TrainSettings(steps=1, length=length).updates,
    }
    seeds = range(args.seeds)
    shares = [
        *ONE_SHARES,
        *MANY_SHARES * args.seeds,
        *(TUNED_AT,) * (len(args.one_choices) - 1),
    ]
    progress = Progress([float(share) * args.seconds for share in shares], args.quiet)

    def record(run: Run, seed: int = 0) -> dict[str, Any]:
        with progress.run(run.name):
            return folder.record(run, seed) or folder.finish(
                run,
                seed,
                run.train_settings(args.seconds, length, bench.learning_rate),
                bench,
                examination,
                {"git": git_state()},
            )

    try:
        tuned = {how: record(one_point(TUNED_AT, *how)) for how in args.one_choices}
        best = max(tuned, key=lambda how: quality(tuned[how]))
        one = [
            [tuned[best] if share == TUNED_AT else record(one_point(share, *best))]
            for share in ONE_SHARES
        ]
        many = [
            [record(many_points(share, **own), seed) for seed in seeds]
            for share in MANY_SHARES
        ]
    finally:
        progress.close()
    curves = {"one": curve_of(one), "many": curve_of(many)}
    return {
        "length": length,
        "one_point_choices": curve_of([[each] for each in tuned.values()]),
        "updates": own["updates"],
        "curves": curves,
        "comparison": compared(curves["one"], curves["many"]),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    card = environment_card()
    # One for all lengths, so that they compare.
    examination = Examination(length=min(256, *args.lengths), **args.examination)
    bench = Workbench.load(
        args.model,
        Texts(tuple(args.data), tuple(args.held_out), args.max_tokens),
        max(*args.lengths, *args.speed_lengths),
        args.quiet,
    )
    # First: it is short, and says at once whether the machine is quiet.
    speeds = measure_speeds(bench, args)
    shown = {name: getattr(args, name) for name in SHOWN}
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": "train_speed",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": card,
        "settings": {
            "model": shown_path(args.model),
            **shown,
            "rounds": args.rounds,
            "speed_seconds": args.speed_seconds,
            "examination": examination.to_dict(),
            "data_sha256": bench.data_sha256,
            "device": bench.model.device.type,
            "versions": {"torch": torch.__version__},
        },
        "cells": speeds,
        "quality": [
            measure_quality(bench, args, examination, length) for length in args.lengths
        ],
    }


def show(results: Mapping[str, Any]) -> None:
    for cell in results["cells"]:
        print(f"sequences of {cell['length']} tokens, {cell['batch_size']} at once")
        for count, figures in cell["points"].items():
            print(
                f"  {count:>4} points  "
                f"{figures['predictions_per_s']['median']:>9,.0f} predictions/s"
                "  {median:.1f}x ({min:.1f}-{max:.1f})".format(**figures["ratio"])
            )
    for cell in results["quality"]:
        print(f"trained on sequences of {cell['length']} tokens")
        for name, curve in cell["curves"].items():
            for point in curve:
                print(
                    f"  {name:>4}  {point['seconds']:7.1f} s  "
                    f"{point['tokens_per_step']:.3f} tokens per step "
                    f"({min(point['seeds']):.3f}-{max(point['seeds']):.3f})"
                )
        for level in cell["comparison"]:
            print(f"  {level}")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        results = run(args)
        show(results)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, results)
            draw(results, args.out.with_suffix(".png"))
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
