"""Does the engine do what its plan was expected to do?

    python benchmarks/plan_prediction.py --dry-run
    python benchmarks/plan_prediction.py --out benchmarks/results/plan_prediction.json

A plan is the best one for the chances of all sources of guesses (acceptance.json) and
the machine's latency profile. For each way to sample and each number of requests:

- calibrated: a new engine that does not learn, prompts and texts as long as those that
  acceptance.json was measured with. It speaks of one temperature only, so other ones have
  no such row. How alike the texts of both are is part of the difference;
- learnt: the default engine after some rounds of the same prompts, and what it expects
  by then. It is measured with the trees of that moment, although it would go on to
  follow the traffic.

Expected and measured are tokens per step of one request, and tokens per second of all,
without the first step, which reads the prompt. Steps count that begin in texts as long
as the calibration's; requests write on for as many tokens as a step can bring.

Seconds are those of a machine that is now faster, now slower. So the same engine also
writes the same prompts without guesses, in turn, a group of requests at a time, and
what is compared is how much faster guessing is: as expected; as measured; and the bound
tau / (L(rows) / L(1)) of the tokens per step that were measured, L being the profile's
seconds of a step. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from continuations import prompt_ids
from decoding import acceptance_length, decode_counts, speed_of
from environment import ROOT, environment_card, shown_path
from harness import document, running
from stats import Spread, ratios

from vllm_ppd.adaptive.step_timing import StepTiming, mean_rows
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.cli.engines import (
    EngineFailedError,
    EngineProcess,
    engine_environment,
    settle,
)
from vllm_ppd.cli.generation import Batch
from vllm_ppd.files import write_json
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.defaults import ACCEPTANCE_FILE
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.search.report import evidence_for, load_figures
from vllm_ppd.train.data import read_stream
from vllm_ppd.trees.menu import Tier, TreePlan

CALIBRATED, LEARNT = "calibrated", "learnt"
# Tokens that a step can bring: those of a tree's longest path, and one.
_REACH = 16
# Groups of requests before an engine that does not learn is measured.
_WARM_UP = 8
_NO_GUESSES = TreePlan((Tier(None),))


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


def groups(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[list[int]]]:
    for first in range(0, len(prompts), size):
        yield [list(ids) for ids in prompts[first : first + size]]


@dataclass(frozen=True)
class Round:
    """All prompts once with the plan's guesses, and once without any."""

    guessing: list[Batch]
    plain: list[Batch]

    @classmethod
    def of(
        cls,
        engine: EngineProcess,
        plan: TreePlan,
        prompts: Sequence[Sequence[int]],
        batch: int,
        params: dict[str, Any],
    ) -> Round:
        found = cls([], [])
        for group in groups(prompts, batch):
            engine.hold(_NO_GUESSES)
            found.plain.append(engine.generate(group, params))
            engine.hold(plan)
            found.guessing.append(engine.generate(group, params))
        return found


def cell_of(
    kind: str,
    temperature: float,
    batch: int,
    report: dict[str, Any],
    rounds: Sequence[Round],
    max_tokens: int,
    context: int,
) -> dict[str, Any]:
    """Expected and measured; `context` is the mean of the requests."""
    plan = TreePlan.from_dict(report["plan"])
    acceptance = AcceptanceModel.from_dict(report["acceptance"])
    profile = LatencyProfile.from_dict(report["profile"]).at_context(context)
    expected = load_figures(plan, evidence_for(plan, acceptance), profile, batch)
    counts = [
        decode_counts(request, max_tokens + _REACH, _REACH)
        for one in rounds
        for each in one.guessing
        for request in each.requests
    ]
    tau, width = acceptance_length(counts)
    speeds = [speed_of(one.guessing) for one in rounds]
    plain = [speed_of(one.plain) for one in rounds]
    speed, over_plain = Spread.of(speeds), Spread.of(ratios(speeds, plain))
    # The measured tokens per step, at what the profile says steps cost.
    bound = tau * expected.plain_seconds / expected.seconds
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
            "plain_tokens_per_s": Spread.of(plain).to_dict(2),
            "over_plain": over_plain.to_dict(4),
            "bound": round(bound, 4),
        },
        "expected_over_measured": {
            "tokens_per_step": round(expected.tau / tau, 4),
            "tokens_per_s": round(expected.tokens_per_second / speed.median, 4),
            "over_plain": round(expected.gain / over_plain.median, 4),
        },
        "over_plain_of_bound": round(over_plain.median / bound, 4),
        "plan_changes": report["plan_changes"],
        # What the engine's own clock made of its profile.
        "timings": [shown_timing(StepTiming(**each)) for each in report["timings"]],
    }


def shown_timing(timing: StepTiming) -> dict[str, Any]:
    """A look's steps, with the mean of their rows."""
    steps = dict(timing.rows)
    shown = {"rows": round(mean_rows(timing.rows), 3), "steps": sum(steps.values())}
    return {**timing._asdict(), **shown, "bare": steps.get(1.0, 0)}


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
    # What does not learn needs a few to be warm.
    for _ in range(args.learning_rounds if kind == LEARNT else 1):
        for batch in args.batch:
            first = len(prompts) if kind == LEARNT else _WARM_UP * batch
            for group in groups(prompts[:first], batch):
                engine.generate(group, learnt)
    settle()
    report = engine.report()
    plan = TreePlan.from_dict(report["plan"])
    cells = []
    for batch in args.batch:
        say(f"{kind}, temperature {temperature:g}, {batch} at a time")
        rounds = [
            Round.of(engine, plan, prompts, batch, longer) for _ in range(args.rounds)
        ]
        context = len(prompts[0]) + max_tokens // 2
        cell = cell_of(kind, temperature, batch, report, rounds, max_tokens, context)
        cells.append(cell)
        say(line(cell))
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
    heads = [
        "| plan | temperature | requests | tokens/step expected | measured (95 %) | "
        "ratio | over plain expected | measured (min-max) | ratio | bound | "
        "of the bound |",
        "|---" * 11 + "|",
    ]
    return "\n".join([*heads, *map(line, cells)])


def line(cell: dict[str, Any]) -> str:
    """One result of the table."""
    expected, measured = cell["expected"], cell["measured"]
    ratio, faster = cell["expected_over_measured"], measured["over_plain"]
    return (
        f"| {cell['plan']} | {cell['temperature']:g} | {cell['batch']} "
        f"| {expected['tokens_per_step']:.3f} "
        f"| {measured['tokens_per_step']:.3f} ± {measured['half_width_95']:.3f} "
        f"| {ratio['tokens_per_step']:.3f} | {expected['over_plain']:.3f} "
        f"| {faster['median']:.3f} ({faster['min']:.3f}-{faster['max']:.3f}) "
        f"| {ratio['over_plain']:.3f} | {measured['bound']:.3f} "
        f"| {cell['over_plain_of_bound']:.3f} |"
    )


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
    for name, shown in (
        ("tokens_per_step", "tokens per step"),
        ("over_plain", "speed over plain decoding"),
    ):
        errors = [abs(c["expected_over_measured"][name] - 1) for c in results["cells"]]
        say(f"{shown}: off by {median(errors):.1%} in the median")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
        say(f"written to {args.out} after {time.monotonic() - begun:.0f} s")
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
