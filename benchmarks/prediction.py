"""Does vLLM accept what acceptance.json says it will?

    python benchmarks/prediction.py --dry-run
    python benchmarks/prediction.py --out benchmarks/results/prediction.json

Trees are found from the prompt tokens' acceptance.json. Their acceptance length
(tokens per step) and speed are predicted, then measured in vLLM:

- predicted: `vllm_ppd.search.policy_value` with acceptance.json for the temperature that it
  was measured at, and with a table measured here for any other. Speed divides by the
  time of a plain step with as many rows, measured with plain vLLM decoding that many
  requests at once;
- walked: the same trees followed over the model's own continuations, place by place.
  It knows how distances depend on each other, which the prediction does not; where
  walked and measured agree but predicted does not, the independence is what is wrong;
- measured: vLLM's own outputs, one request at a time, for prompts of the same length
  and continuations of the same length as acceptance.json was measured with. Steps that
  the end of the text could have cut short are left out of the acceptance length.

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ablations.examination import texts_of
from ablations.walk import mean_acceptance_length
from continuations import measure_texts, prompt_ids
from decoding import (
    acceptance_length,
    decode_counts,
    decode_speed,
    latency_curve,
    step_seconds,
)
from environment import ROOT, environment_card, shown_path
from harness import document, running
from stats import Spread

from vllm_ppd.calibrate.measure import Measurement
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.cli.engines import (
    EngineFailedError,
    EngineProcess,
    engine_environment,
    settle,
)
from vllm_ppd.cli.generation import Generation
from vllm_ppd.files import write_json
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.defaults import ACCEPTANCE_FILE
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_search import evaluate, optimal_policy
from vllm_ppd.train.data import TokenStream, read_stream
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.trees.tree import TreePolicy

PLAIN = "plain"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder")
    prompts = ROOT / "trained_prompts" / "demo"
    add("--prompts", type=Path, default=prompts, help="folder with acceptance.json")
    text = ROOT / "demo_model" / "held_out.jsonl"
    add("--text", nargs="+", default=[str(text)], help="held-out text")
    add("--rows", type=int, nargs="+", default=[4, 16], help="of the trees")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7])
    add("--num-prompts", type=int, default=64, help="requests per round")
    add("--rounds", type=int, default=3, help="in which the engines take turns")
    add(
        "--ppd-config",
        type=json.loads,
        # DraftInputs of prompt tokens alone: that is what acceptance.json is about.
        default={"bigram": False, "ngram": False},
        metavar="JSON",
        help="more keys of PPD's speculative_config (default: %(default)s)",
    )
    add("--eager", action="store_true", help="do not compile the model")
    add("--in-process", action="store_true", help="engine core in the front end")
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--dry-run", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(argv)
    args.longest = math.inf
    if args.dry_run:
        args.num_prompts, args.rounds, args.rows, args.longest = 4, 1, args.rows[:1], 24
        args.eager = True
    if min(args.rows) < 2:
        parser.error(f"--rows is {min(args.rows)}; expected 2 or more")
    if min(args.num_prompts, args.rounds) < 1:
        parser.error("--num-prompts and --rounds must be at least 1")
    return args


def calibration(stats: AcceptanceStats, args: argparse.Namespace) -> dict[str, int]:
    """Lengths of prompts and of continuations: those of the table's measurement."""
    found = dict((stats.source or {}).get("settings", {}))
    own = CalibrationSettings()
    return {
        name: int(min(found.get(name, getattr(own, name)), args.longest))
        for name in ("prompt_length", "continuation")
    }


def plain_latency(
    engine: EngineProcess, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> dict[int, float]:
    """Seconds of a plain step with 1, 2, 4, ... rows, up to the largest tree."""
    counts = {1, *args.rows}
    counts |= {2**n for n in range(1, 7) if 2**n < max(args.rows)}
    params = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
    if args.dry_run:
        params["max_tokens"] = 8
    found: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(args.rounds + 1):
        for count in sorted(counts):
            some = [prompts[i % len(prompts)] for i in range(count)]
            seconds = step_seconds(engine.generate(some, params))
            if number:  # the first round warms up
                found[count].append(seconds)
    return {count: median(values) for count, values in sorted(found.items())}


def run_requests(
    engine: EngineProcess,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
) -> list[Generation]:
    """One request at a time; a text ends where the model ends it."""
    params = {"temperature": temperature, "max_tokens": max_tokens}
    batches = [engine.generate([prompt], params) for prompt in prompts]
    return [request for batch in batches for request in batch.requests]


def cell_of(
    policy: TreePolicy,
    temperature: float,
    stats: AcceptanceStats,
    found: Measurement,
    latency: LatencyCurve,
    rounds: Sequence[Sequence[Generation]],
    max_tokens: int,
) -> dict[str, Any]:
    """Predicted against measured, for one set of trees and one temperature.

    stats: what the prediction is made from; `found` and `rounds` are of the same
    prompts, the latter what vLLM wrote.
    """
    value = evaluate(policy, stats, latency)
    reach = policy.num_prompt_tokens + 1
    counts = [
        decode_counts(request, max_tokens, reach)
        for requests in rounds
        for request in requests
    ]
    if temperature == 0:
        # Every round writes the same.
        counts = counts[: len(rounds[0])]
    measured, width = acceptance_length(counts)
    speeds = [
        median(decode_speed(request) for request in requests) for requests in rounds
    ]
    speed = Spread.of(speeds)
    return {
        "rows": policy.max_rows,
        "temperature": temperature,
        "predicted": {
            "tokens_per_step": round(value.tau, 4),
            "tokens_per_s": round(value.tokens_per_second, 2),
            "state_distribution": [round(p, 4) for p in value.state_distribution],
        },
        "walked": {
            "tokens_per_step": round(
                mean_acceptance_length(policy.trees, texts_of(found)), 4
            )
        },
        "measured": {
            "tokens_per_step": round(measured, 4),
            "half_width_95": round(width, 4),
            "steps": sum(steps for _, steps in counts),
            "tokens_per_s": speed.to_dict(2),
        },
        "predicted_over_measured": {
            "tokens_per_step": round(value.tau / measured, 4),
            "tokens_per_s": round(value.tokens_per_second / speed.median, 4),
        },
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    prompts = PromptTokens.load(args.prompts)
    stats = AcceptanceStats.load(args.prompts / ACCEPTANCE_FILE)
    lengths = calibration(stats, args)
    max_tokens = lengths["continuation"]
    policies = {
        rows: optimal_policy(
            stats, LatencyCurve.constant(), rows, prompts.num_ept
        ).policy
        for rows in args.rows
    }
    card = environment_card(engine_environment(args.in_process))
    say("following the model's own continuations")
    stream, tables, found = follow(args, prompts, stats, lengths)
    ids = prompt_ids(stream, lengths["prompt_length"], args.num_prompts)
    base = {
        "model": args.model,
        "seed": 0,
        "enforce_eager": args.eager,
        "enable_prefix_caching": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = {PLAIN: base}
        for rows, policy in policies.items():
            tree = Path(folder) / f"{rows}.json"
            policy.save(tree)
            ppd = {
                "method": "ppd",
                "model": str(args.prompts),
                "tree": str(tree),
                **args.ppd_config,
            }
            settings[str(rows)] = {**base, "speculative_config": ppd}
        with running(settings, args.in_process, say) as engines:
            seconds = plain_latency(engines[PLAIN], ids, args)
            written: dict[tuple[int, float], list[list[Generation]]] = {}
            for number in range(args.rounds + 1):
                for rows in policies:
                    settle()
                    engine = engines[str(rows)]
                    if not number:
                        run_requests(engine, ids[:1], max_tokens, 0.0)
                        continue
                    for temperature in args.temperature:
                        say(f"round {number}: {rows} rows, temperature {temperature:g}")
                        requests = run_requests(engine, ids, max_tokens, temperature)
                        written.setdefault((rows, temperature), []).append(requests)
            cards = {name: engine.card for name, engine in engines.items()}
    cells = [
        cell_of(
            policies[rows],
            temperature,
            tables[temperature],
            found[temperature],
            latency_curve(seconds),
            rounds,
            max_tokens,
        )
        for (rows, temperature), rounds in written.items()
    ]
    shown = {
        "model": shown_path(args.model),
        "prompts": shown_path(str(args.prompts)),
        "text": [shown_path(file) for file in args.text],
        "num_prompts": args.num_prompts,
        "rounds": args.rounds,
        "ppd_config": args.ppd_config,
        "eager": args.eager,
        **lengths,
        "plain_step_s": {str(count): value for count, value in seconds.items()},
        "prompt_tokens_sha256": (stats.source or {}).get("prompt_tokens_sha256"),
    }
    return document("prediction", card, cards, shown, cells)


def follow(
    args: argparse.Namespace,
    prompts: PromptTokens,
    stats: AcceptanceStats,
    lengths: Mapping[str, int],
) -> tuple[TokenStream, dict[float, AcceptanceStats], dict[float, Measurement]]:
    """Held-out text; per temperature the table to predict from, and the places."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    stream = read_stream(
        args.text,
        tokenizer,
        max_tokens=4_000_000,
        least_tokens=lengths["prompt_length"],
    )
    model = FrozenModel.load(args.model, max_length=sum(lengths.values()))
    found = {
        temperature: measure_texts(
            model, prompts, stream, lengths, args.num_prompts, temperature
        )
        for temperature in args.temperature
    }
    known = (stats.source or {}).get("settings", {}).get("temperature", 0.0)
    tables = {
        temperature: stats
        if temperature == known
        else AcceptanceStats(places.acceptance(stats.num_ranks))
        for temperature, places in found.items()
    }
    return stream, tables, found


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| rows | temperature | tokens/step predicted | walked | measured (95 %) "
        "| predicted / measured | tokens/s predicted | measured |",
        "|---" * 8 + "|",
    ]
    for cell in cells:
        predicted, measured = cell["predicted"], cell["measured"]
        lines.append(
            f"| {cell['rows']} | {cell['temperature']:g} "
            f"| {predicted['tokens_per_step']:.3f} "
            f"| {cell['walked']['tokens_per_step']:.3f} "
            f"| {measured['tokens_per_step']:.3f} ± {measured['half_width_95']:.3f} "
            f"| {cell['predicted_over_measured']['tokens_per_step']:.3f} "
            f"| {predicted['tokens_per_s']:.0f} "
            f"| {measured['tokens_per_s']['median']:.0f} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    begun = time.monotonic()
    try:
        results = run(args)
    except (ValueError, EngineFailedError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    print(table(results["cells"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
        say(f"written to {args.out} after {time.monotonic() - begun:.0f} s")
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
