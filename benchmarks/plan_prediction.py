"""Does the engine do what its plan was expected to do?

    python benchmarks/plan_prediction.py --dry-run
    python benchmarks/plan_prediction.py --out benchmarks/results/plan_prediction.json

A plan is the best one for the chances of all sources of guesses (evidence.json) and
the machine's latency profile. For each way to sample and each number of requests:

- calibrated: a new engine that does not learn, prompts and texts as long as those that
  evidence.json was measured with. It speaks of one temperature only, so other ones have
  no such row. How alike the texts of both are is part of the difference;
- learnt: the default engine after some rounds of the same prompts, and what it expects
  by then. It is measured with the trees of that moment, although it would go on to
  follow the traffic.

Expected and measured are tokens per step of one request, and tokens per second of all,
without the first step, which reads the prompt. Steps count that begin in texts as long
as the calibration's; requests write on for as many tokens as a step can bring. The last
line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from continuations import prompt_ids
from decoding import acceptance_length, decode_counts
from environment import ROOT, environment_card, shown_path
from harness import document, running
from stats import Spread

from vllm_ppd.acceptance import AcceptanceStats
from vllm_ppd.atomic import write_json
from vllm_ppd.cli.engine_process import (
    EngineFailedError,
    EngineProcess,
    engine_environment,
    settle,
)
from vllm_ppd.cli.generation import Batch
from vllm_ppd.default_trees import ACCEPTANCE_FILE
from vllm_ppd.evidence import Evidence
from vllm_ppd.plan import TreePlan
from vllm_ppd.plan_report import evidence_for, load_figures
from vllm_ppd.profile import LatencyProfile
from vllm_ppd.train.calibration_settings import CalibrationSettings
from vllm_ppd.train.data import read_stream

CALIBRATED, LEARNT = "calibrated", "learnt"
# Tokens that a step can bring: those of a tree's longest path, and one.
_REACH = 16


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder")
    prompts = ROOT / "trained_prompts" / "demo"
    add("--prompts", type=Path, default=prompts, help="calibrated folder")
    text = ROOT / "demo_model" / "held_out.jsonl"
    add("--text", nargs="+", default=[str(text)], help="held-out text")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    add("--batch", type=int, nargs="+", default=[1], help="requests at a time")
    add("--num-prompts", type=int, default=48, help="requests per round")
    add("--rounds", type=int, default=3, help="that are measured")
    add("--learning-rounds", type=int, default=3, help="before those")
    add("--eager", action="store_true", help="do not compile the model")
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--dry-run", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.num_prompts, args.rounds, args.learning_rounds = 4, 1, 1
        args.temperature, args.eager = args.temperature[:2], True
    if min(args.num_prompts, args.rounds, *args.batch) < 1:
        parser.error("--num-prompts, --rounds and --batch must be at least 1")
    return args


def run_round(
    engine: EngineProcess,
    prompts: Sequence[Sequence[int]],
    batch: int,
    params: dict[str, Any],
) -> list[Batch]:
    return [
        engine.generate(prompts[first : first + batch], params)
        for first in range(0, len(prompts), batch)
    ]


def decode_rate(batch: Batch) -> tuple[int, float]:
    """Tokens and seconds after the last request's first step, until one ends."""
    begun = max(request.steps[0].at_s for request in batch.requests)
    ended = min(request.steps[-1].at_s for request in batch.requests)
    tokens = sum(
        len(step.ids)
        for request in batch.requests
        for step in request.steps
        if begun < step.at_s <= ended
    )
    return tokens, ended - begun


def cell_of(
    kind: str,
    temperature: float,
    batch: int,
    report: dict[str, Any],
    rounds: Sequence[Sequence[Batch]],
    max_tokens: int,
) -> dict[str, Any]:
    plan = TreePlan.from_dict(report["plan"])
    evidence = Evidence.from_dict(report["evidence"])
    profile = LatencyProfile.from_dict(report["profile"])
    expected = load_figures(plan, evidence_for(plan, evidence), profile, batch)
    counts = [
        decode_counts(request, max_tokens + _REACH, _REACH)
        for batches in rounds
        for each in batches
        for request in each.requests
    ]
    tau, width = acceptance_length(counts)
    speeds = []
    for batches in rounds:
        pairs = [decode_rate(each) for each in batches]
        speeds.append(sum(t for t, _ in pairs) / sum(s for _, s in pairs))
    speed = Spread.of(speeds)
    return {
        "plan": kind,
        "temperature": temperature,
        "batch": batch,
        "expected": {
            "tokens_per_step": round(expected.tau, 4),
            "tokens_per_s": round(expected.tokens_per_second, 2),
            "rows_per_step": round(expected.mean_rows, 3),
            "over_plain": round(expected.gain, 4),
        },
        "measured": {
            "tokens_per_step": round(tau, 4),
            "half_width_95": round(width, 4),
            "tokens_per_s": speed.to_dict(2),
        },
        "expected_over_measured": {
            "tokens_per_step": round(expected.tau / tau, 4),
            "tokens_per_s": round(expected.tokens_per_second / speed.median, 4),
        },
        "plan_changes": report["plan_changes"],
    }


def measure(
    kind: str,
    engine: EngineProcess,
    temperature: float,
    prompts: list[list[int]],
    args: argparse.Namespace,
    max_tokens: int,
) -> list[dict[str, Any]]:
    """Learn from the prompts if the engine learns, at all loads; then measure each
    load, with the trees that the expectation is about."""
    params = {"temperature": temperature, "ignore_eos": True}
    learnt = {**params, "max_tokens": max_tokens}
    longer = {**params, "max_tokens": max_tokens + _REACH}
    for _ in range(args.learning_rounds if kind == LEARNT else 1):
        for batch in args.batch:
            run_round(engine, prompts, batch, learnt)
    settle()
    report = engine.report()
    engine.hold()
    cells = []
    for batch in args.batch:
        say(f"{kind}, temperature {temperature:g}, {batch} at a time")
        rounds = [run_round(engine, prompts, batch, longer) for _ in range(args.rounds)]
        cells.append(cell_of(kind, temperature, batch, report, rounds, max_tokens))
    return cells


def run(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    stats = AcceptanceStats.load(args.prompts / ACCEPTANCE_FILE)
    own = CalibrationSettings()
    known = (stats.source or {}).get("settings", {})
    length = int(known.get("prompt_length", own.prompt_length))
    max_tokens = int(known.get("continuation", own.continuation))
    temperature_known = float(known.get("temperature", 0.0))
    if args.dry_run:
        length, max_tokens = 16, 32
    stream = read_stream(
        args.text,
        AutoTokenizer.from_pretrained(args.model),
        max_tokens=4_000_000,
        least_tokens=length,
    )
    prompts = [list(ids) for ids in prompt_ids(stream, length, args.num_prompts)]
    base = {
        "model": args.model,
        "seed": 0,
        "enforce_eager": args.eager,
        "enable_prefix_caching": False,
    }
    ppd = {"method": "ppd", "model": str(args.prompts)}
    settings = {
        CALIBRATED: {**base, "speculative_config": {**ppd, "online": False}},
        **{
            f"{LEARNT} at {temperature:g}": {**base, "speculative_config": ppd}
            for temperature in args.temperature
        },
    }
    card = environment_card(engine_environment(False))
    cells, cards = [], {}
    for name, one in settings.items():
        # One at a time: what an engine learns comes from one way to sample.
        with running({name: one}, False, say) as engines:
            engine = engines[name]
            cards[name] = engine.card
            kind = name.split(" ")[0]
            temperature = temperature_known
            if kind == LEARNT:
                temperature = float(name.rsplit(" ", 1)[1])
            cells += measure(kind, engine, temperature, prompts, args, max_tokens)
    shown = {
        "model": shown_path(args.model),
        "prompts": shown_path(str(args.prompts)),
        "text": [shown_path(file) for file in args.text],
        "prompt_length": length,
        "max_tokens": max_tokens,
        "num_prompts": args.num_prompts,
        "rounds": args.rounds,
        "learning_rounds": args.learning_rounds,
        "eager": args.eager,
    }
    return document("plan_prediction", card, cards, shown, cells)


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| plan | temperature | requests | tokens/step expected | measured (95 %) | "
        "ratio | tokens/s expected | measured | ratio |",
        "|---" * 9 + "|",
    ]
    for cell in cells:
        expected, measured = cell["expected"], cell["measured"]
        ratio = cell["expected_over_measured"]
        lines.append(
            f"| {cell['plan']} | {cell['temperature']:g} | {cell['batch']} "
            f"| {expected['tokens_per_step']:.3f} "
            f"| {measured['tokens_per_step']:.3f} ± {measured['half_width_95']:.3f} "
            f"| {ratio['tokens_per_step']:.3f} | {expected['tokens_per_s']:.0f} "
            f"| {measured['tokens_per_s']['median']:.0f} "
            f"| {ratio['tokens_per_s']:.3f} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    begun = time.monotonic()
    try:
        results = run(args)
    except (ValueError, EngineFailedError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    print(table(results["cells"]))
    errors = [
        abs(c["expected_over_measured"]["tokens_per_step"] - 1)
        for c in results["cells"]
    ]
    say(f"tokens per step: off by {median(errors):.1%} in the median")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
        say(f"written to {args.out} after {time.monotonic() - begun:.0f} s")
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
