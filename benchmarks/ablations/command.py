"""What each choice in training prompt tokens is worth, on the demo model.

    python -m benchmarks.ablations                  # 35 minutes on one core
    python -m benchmarks.ablations --quick          # does it run at all?
    python -m benchmarks.ablations --tables ept,alpha --seeds 3

From the repository's root. Each run is a short training that changes one thing in the
baseline, with the same seconds of wall-clock. Finished runs are kept in the work
folder: stopped with Ctrl-C or killed, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment_card, git_state, shown_path
from vllm_ppd.files import write_json
from vllm_ppd.train.trainer import Interrupted

from .document import ablations_document
from .examination import Examination
from .page import PAGE
from .plan import BASELINE_RATE, chosen_tables, runs_of
from .plot import draw
from .progress import Progress
from .runs import RunFolder
from .workbench import Texts, Workbench

RESULTS = ROOT / "benchmarks" / "results" / "ablations.json"
_CORPUS = ROOT / "build" / "demo_corpus" / "train.jsonl"
_QUICK_EXAMINATION: dict[str, Any] = {
    "prompts": 4,
    "continuation": 16,
    "sequences": 2,
    "rows": (4, 16),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder")
    add("--data", nargs="+", default=[str(_CORPUS)], help="training text")
    add(
        "--held-out",
        nargs="+",
        default=[str(ROOT / "demo_model" / "held_out.jsonl")],
        help="text to judge by",
    )
    add("--max-tokens", type=int, default=4_000_000, help="leave further text unread")
    add("--length", type=int, default=256, help="tokens per training sequence")
    add("--seconds-per-run", type=float, default=60.0, metavar="S")
    add("--seeds", type=int, default=1, metavar="K", help="repeat all with K seeds")
    add("--tables", help="comma-separated; all by default")
    add("--threads", type=int, default=1, help="of torch, on CPU")
    add("--work", type=Path, help="folder of finished runs (default: build/ablations)")
    add("--out", type=Path, help=f"results (default: {RESULTS.relative_to(ROOT)})")
    add("--quick", action="store_true", help="tiny: does it run at all?")
    add("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds_per_run = min(args.seconds_per_run, 0.25)
        args.max_tokens = min(args.max_tokens, 50_000)
    name = "ablations-quick" if args.quick else "ablations"
    args.work = args.work or ROOT / "build" / name
    # A trial's figures mean nothing and must not replace results.
    quick_out = args.work / "results.json"
    args.out = args.out or (quick_out if args.quick else RESULTS)
    if args.data == [str(_CORPUS)] and not _CORPUS.exists():
        parser.error(
            f"there is no {_CORPUS.relative_to(ROOT)}; make it with python "
            "demo_model/corpus.py --out build/demo_corpus, or give --data"
        )
    for flag, value in (
        ("--seconds-per-run", args.seconds_per_run),
        ("--seeds", args.seeds),
        ("--threads", args.threads),
    ):
        if not value > 0:
            parser.error(f"{flag} is {value}; expected above 0")
    return args


def examination_of(args: argparse.Namespace) -> Examination:
    return Examination(length=args.length, **_QUICK_EXAMINATION if args.quick else {})


def make_runs(args: argparse.Namespace) -> dict[str, Any]:
    """Do all runs that are not done; the results file's content."""
    tables = chosen_tables(args.tables.split(",") if args.tables else None)
    runs = runs_of(tables)
    torch.set_num_threads(args.threads)
    card = environment_card()
    examination = examination_of(args)
    bench = Workbench.load(
        args.model,
        Texts(tuple(args.data), tuple(args.held_out), args.max_tokens),
        max(args.length, examination.prompt_length + examination.continuation),
        args.quiet,
    )
    conditions = {
        "seconds_per_run": args.seconds_per_run,
        "examination": examination.to_dict(),
        "base_model": dataclasses.asdict(bench.base),
        "data_sha256": bench.data_sha256,
        "text_tokens": bench.text.tokens.numel(),
        "length": args.length,
        "threads": args.threads,
    }
    folder = RunFolder(args.work, conditions)
    folder.open()
    todo = [
        (run, seed)
        for seed in range(args.seeds)
        for run in runs
        if folder.record(run, seed) is None
    ]
    progress = Progress(
        [float(run.share) * args.seconds_per_run for run, _ in todo], args.quiet
    )
    about = {"git": git_state()}
    try:
        for run, seed in todo:
            settings = run.train_settings(
                args.seconds_per_run, args.length, BASELINE_RATE * bench.learning_rate
            )
            with progress.run(run.name):
                record = folder.finish(run, seed, settings, bench, examination, about)
            progress.say(_line(record))
    finally:
        progress.close()
    records = {
        run.name: [folder.record(run, seed) or {} for seed in range(args.seeds)]
        for run in runs
    }
    shown = {**conditions, "model": shown_path(args.model), "seeds": args.seeds}
    return ablations_document(tables, records, card, shown)


def _line(record: dict[str, Any]) -> str:
    """A finished run in one line of the terminal."""
    taus = ", ".join(
        f"{figures['tau']:.3f} at {rows}" for rows, figures in record["rows"].items()
    )
    top1 = " ".join(f"{rate:.3f}" for rate in record["acceptance"]["top1"])
    return f"{record['run']:24} top-1 {top1}; tokens per step {taus} rows"


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Its bar for loading weights would be the longest output of a trial.
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        results = make_runs(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
        draw(results, args.out.with_suffix(".png"))
        if args.out == RESULTS:
            PAGE.write(results)
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}, and its plot beside it")
    return 0
