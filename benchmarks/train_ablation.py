"""What each choice in training prompt tokens is worth, on the demo model.

    python benchmarks/train_ablation.py --dry-run                # does it run at all?
    python benchmarks/train_ablation.py --out benchmarks/results/train_ablation.json
    python benchmarks/train_ablation.py --tables ept,alpha --seeds 3

Each run is a `vllm-ppd train` of the same wall-clock time that changes one thing in the
baseline: m = 3, one EPT, KL to the model, alpha 0.8, started from text, 32 insertion
points in each of 8 sequences. `vllm-ppd calibrate` then judges it on the model's own
greedy continuations of held-out text: how often the true token is each distance's first
draft token (top-1) or among its ten best, and the mean acceptance length of the best
trees of at most so many rows (an ensemble of e costs e rows per prompt token).

Finished runs are kept in the work folder: the same command goes on where it stopped.
The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from results import (
    ROOT,
    environment_card,
    finish,
    markdown,
    parser_of,
    results_document,
    say,
)

ROWS = (8, 16, 64)
BASELINE = {"batch-size": 8, "points": 32, "updates": 1}


def _varied(flag: str, *values: Any) -> dict[str, dict[str, Any]]:
    """A run per value of a flag; the baseline's own value is given as text."""
    return {
        "baseline" if isinstance(value, str) else f"{flag}={value}": {}
        if isinstance(value, str)
        else {flag: value}
        for value in values
    }


# Tables of runs by name, and what differs from the baseline: flags of `vllm-ppd train`,
# "share" of the seconds, and "from", the run whose prompt tokens it starts with.
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "time": {
        "time=1_16": {"share": 1 / 16},
        "time=1_4": {"share": 1 / 4},
        "baseline": {},
        "time=4": {"share": 4},
    },
    "text": _varied("max-tokens", 8192, 16384, 131072) | {"baseline": {}},
    "prompt_tokens": _varied("num-prompt-tokens", 1, 2, "3", 4, 5, 6),
    "ept": _varied("num-ept", "1", 2, 4, 8),
    "loss": {"baseline": {}, "loss=labels": {"loss": "labels"}},
    "alpha": _varied("alpha", 0.4, 0.6, "0.8", 1.0),
    "init": {
        "baseline": {},
        "init=vocabulary": {"init": "vocabulary"},
        "init=quarter": {"from": "time=1_4"},
        "init=m_1": {"from": "num-prompt-tokens=1"},
    },
    "batch": _varied("batch-size", 1, 2, 4, "8"),
    "points": _varied("points", 1, 4, 16, "32", 64),
}


def runs_of(tables: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Every run of the tables once, each after the one that it starts from."""
    everything = {name: run for runs in TABLES.values() for name, run in runs.items()}
    chosen: dict[str, dict[str, Any]] = {}
    for table in tables:
        for name, run in TABLES[table].items():
            start = run.get("from")
            if start is not None:
                chosen.setdefault(start, everything[start])
            chosen.setdefault(name, run)
    return chosen


def train_command(
    run: Mapping[str, Any], seed: int, folder: Path, args: argparse.Namespace
) -> list[str]:
    """The `vllm-ppd train` of a run, into `folder`, going on from its checkpoint."""
    changes = {k: v for k, v in run.items() if k not in ("share", "from")}
    flags: dict[str, Any] = {
        **BASELINE,
        "model": args.model,
        "data": args.data,
        "held-out": args.held_out,
        "length": args.length,
        "minutes": args.seconds * run.get("share", 1) / 60,
        "evaluations": 1,
        "evaluation-sequences": 1,
        "seed": seed,
        "out": folder,
        **changes,
    }
    if "from" in run:
        flags["init"] = folder.with_name(f"{run['from']},seed={seed}")
    return command("train", flags, "--resume", "--cpu", "--quiet")


def calibrate_command(folder: Path, args: argparse.Namespace) -> list[str]:
    """The `vllm-ppd calibrate` of a run: every place of the continuations, no bigram
    table."""
    flags = {
        "model": args.model,
        "data": args.held_out,
        "temperature": 0.0,
        "bigram-entries": 0,
        "prompt-length": args.prompt_length,
        "continue": args.continuation,
        "points": args.points,
    }
    more = ["--cpu", "--quiet", "--overwrite"]
    return command("calibrate", flags, str(folder), *more)


def command(name: str, flags: Mapping[str, Any], *more: str) -> list[str]:
    pairs = [[f"--{flag}", str(value)] for flag, value in flags.items()]
    start = [sys.executable, "-m", "vllm_ppd", name]
    return [*start, *more, *(part for pair in pairs for part in pair)]


def examine(folder: Path) -> dict[str, Any]:
    """The figures of a trained and calibrated folder."""
    from vllm_ppd.prompt_tokens.tokens import PromptTokens, tensor_file
    from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
    from vllm_ppd.search.latency import LatencyCurve
    from vllm_ppd.search.policy_iteration import best_policy

    tokens = PromptTokens.load(folder)
    table = AcceptanceModel.load(folder / ACCEPTANCE_FILE).marginal
    model, constant = AcceptanceModel.of(table), LatencyCurve.constant()
    lengths = {
        str(rows): best_policy(model, constant, rows, tokens.num_ept).acceptance_length
        for rows in ROWS
    }
    return {
        "top1": [round(float(row[0]), 4) for row in table],
        "top10": [round(float(row[:10].sum()), 4) for row in table],
        "acceptance_length": {n: round(length, 4) for n, length in lengths.items()},
        "parameters": tokens.embeddings.numel(),
        "bytes": tensor_file(folder).stat().st_size,
    }


def finish_run(
    name: str, run: Mapping[str, Any], seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """A run's record, from the work folder if it is there already.

    Raises ValueError when a command fails, with its last line.
    """
    folder = args.work / f"{name},seed={seed}"
    file = folder.with_name(folder.name + ".json")
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    commands = [train_command(run, seed, folder, args), calibrate_command(folder, args)]
    if (folder / "config.json").exists():
        del commands[0]  # trained, but not calibrated
    for each in commands:
        done = subprocess.run(each, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise ValueError(f"{' '.join(each[2:5])} of {name} failed: {reason}")
    record = {"run": name, "seed": seed, **examine(folder)}
    file.write_text(json.dumps(record), encoding="utf-8")
    return record


def table(name: str, cells: list[dict[str, Any]]) -> str:
    """One Markdown table: a row per run, medians over seeds."""
    rows = [["run", "top-1 by distance", "top-10", *(f"{n} rows" for n in ROWS)]]
    for run in TABLES[name]:
        seeds = [cell for cell in cells if cell["run"] == run]
        row = [run]
        for rates in ("top1", "top10"):
            columns = zip(*(cell[rates] for cell in seeds), strict=True)
            shown = (f"{median(column):.3f}".removeprefix("0") for column in columns)
            row.append(" ".join(shown))
        for count in ROWS:
            lengths = [cell["acceptance_length"][str(count)] for cell in seeds]
            row.append(f"{median(lengths):.2f}")
        rows.append(row)
    return f"### {name}\n\n{markdown(rows)}\n"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    corpus = ROOT / "build" / "demo_corpus" / "train.jsonl"
    held_out = ROOT / "demo_model" / "held_out.jsonl"
    add("--model", type=Path, default=ROOT / "demo_model" / "model", help="folder")
    add("--data", type=Path, default=corpus, help="training text")
    add("--held-out", type=Path, default=held_out, help="text to judge by")
    add("--length", type=int, default=256, help="tokens per training sequence")
    add("--seconds", type=float, default=60.0, help="of a run, evaluations included")
    add("--seeds", type=int, default=1, help="repeat all with so many seeds")
    add("--tables", default=",".join(TABLES), help="what is varied, comma-separated")
    add("--threads", type=int, default=1, help="of torch, on a CPU")
    add("--work", type=Path, default=ROOT / "build" / "train_ablation")
    args = parser.parse_args(argv)
    args.prompt_length, args.continuation, args.points = 64, 96, 6000
    if args.dry_run:
        args.seconds, args.tables, args.data = 0.5, "loss", args.held_out
        args.prompt_length, args.continuation, args.points = 16, 16, 40
        args.work = args.work.with_name("train_ablation-dry")
    args.tables = args.tables.split(",")
    for name in args.tables:
        if name not in TABLES:
            parser.error(f"there is no table {name!r}; choose from {', '.join(TABLES)}")
    if not args.data.exists():
        parser.error(
            f"there is no {args.data}; make it with python demo_model/corpus.py --out "
            "build/demo_corpus, or give --data"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    card = environment_card()
    args.work.mkdir(parents=True, exist_ok=True)
    cells = []
    try:
        for seed in range(args.seeds):
            for name, run in runs_of(args.tables).items():
                cells.append(finish_run(name, run, seed, args))
                say(f"{name}, seed {seed}: {cells[-1]}")
    except ValueError as error:
        say(f"error: {error}")
        return 2
    for name in args.tables:
        print(table(name, cells))
    finish(results_document("train_ablation", card, vars(args), cells), args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
