"""Is PPD faster than plain vLLM, and than vLLM's n-gram speculation? By how much?

    python benchmarks/compare_decoders.py --dry-run
    python benchmarks/compare_decoders.py --out benchmarks/results/NAME.json
    python benchmarks/compare_decoders.py --model MODEL --prompts FOLDER \
        --text TEXTS.jsonl --batch 1,4,16 --temperature 0,0.7,1.0 --rounds 5

All decoders write the same numbers of tokens for the same held-out prompts (end of
text is ignored), alternating A B C A B C ... so that a change in the machine's state
meets all of them. Each speed is tokens per second from the first request on, prompts
included, as long as a request that has finished is followed by another; ratios are
taken within a round, then summarised. Of two engines that run the very same code one
may be several per cent faster, by how it has started: --starts starts all of them anew,
every other time in the opposite order. Greedy decoding of a small model falls into
loops, which are easy to guess: read its figures beside "repeated" (share of 4-grams
seen before) and beside those of sampling.

The very last line of standard output is the results as one compact JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from environment import ROOT, environment_card, shown_path, weight_bytes
from harness import (
    DECODERS,
    Cell,
    Measured,
    decoder_settings,
    document,
    encode_prompts,
    measure_cell,
    report,
    running,
    text_lengths,
)

from vllm_ppd.cli.engines import EngineFailedError, engine_environment
from vllm_ppd.files import write_json


def numbers(kind: type) -> Any:
    """An argparse type: comma-separated numbers."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated list"  # what argparse calls it in errors
    return parse


def names(text: str) -> list[str]:
    found = text.split(",")
    unknown = [name for name in found if name not in DECODERS]
    if unknown or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(DECODERS)}")
    return found


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # What is compared
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder or hub id")
    add(
        "--prompts",
        default=str(ROOT / "trained_prompts" / "demo"),
        metavar="FOLDER",
        help="prompt tokens of that model",
    )
    usual = ["plain", "ppd", "ngram"]
    add("--decoders", type=names, default=usual, help=",".join(DECODERS))
    add(
        "--ppd-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more keys of PPD's speculative_config",
    )
    add(
        "--ngram-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help="keys of n-gram's speculative_config to change",
    )
    # The work
    add(
        "--text",
        type=Path,
        default=ROOT / "demo_model" / "held_out.jsonl",
        metavar="JSONL",
        help='held-out text, {"text": ...} a line',
    )
    add("--num-prompts", type=int, default=16, help="requests per round, at least")
    add("--waves", type=int, default=3, help="at least so many times the batch")
    add("--prompt-tokens", type=int, default=64, help="length of each prompt")
    add("--max-tokens", type=int, default=128, help="tokens written per request")
    add(
        "--range-ratio",
        type=float,
        default=0.5,
        help="lengths of texts differ by so much of --max-tokens, either way",
    )
    add("--batch", type=numbers(int), default=[1, 4, 16], help="requests at a time")
    add("--temperature", type=numbers(float), default=[0.0, 0.7, 1.0])
    add("--rounds", type=int, default=5, help="alternating rounds of each start")
    add("--starts", type=int, default=1, help="times that the engines are started")
    # The engines
    add("--dtype", default="auto", help="as in vllm serve")
    add("--max-model-len", type=int, help="as in vllm serve")
    add("--eager", action="store_true", help="do not compile the model")
    add(
        "--in-process",
        action="store_true",
        help="engine core in the front end's process, unlike vLLM's default",
    )
    # The results
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--dry-run", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.num_prompts, args.prompt_tokens, args.max_tokens = 2, 16, 8
        args.batch, args.temperature, args.rounds = [1, 2], [0.0, 1.0], 3
        args.eager, args.waves = True, 1
    if args.rounds * args.starts < 3:
        parser.error(
            "--rounds times --starts must be at least 3, or there is no spread to show"
        )
    if not 0 <= args.range_ratio < 1:
        parser.error("--range-ratio must be at least 0 and less than 1")
    counts = (args.num_prompts, args.waves, args.rounds, args.starts)
    if min(*args.batch, *counts) < 1:
        parser.error(
            "--batch, --num-prompts, --waves, --rounds and --starts must be at least 1"
        )
    return args


def table(cells: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one row per condition and decoder."""
    head = (
        "batch",
        "temperature",
        "decoder",
        "tokens/s (min-max)",
        "against plain (min-max)",
        "tokens/step",
        "ms/step",
        "ids as plain",
        "repeated",
    )
    rows = [head]
    for cell in cells:
        for name, found in cell["decoders"].items():
            same = found["same_ids_as_plain"]
            speed, ratio = found["tokens_per_s"], found.get("ratio")
            rows.append(
                (
                    str(cell["batch"]),
                    f"{cell['temperature']:g}",
                    name,
                    "{median:,.0f} ({min:,.0f}-{max:,.0f})".format(**speed),
                    "{median:.2f}x ({min:.2f}-{max:.2f})".format(**ratio)
                    if ratio
                    else "-",
                    f"{found['tokens_per_step']['median']:.2f}",
                    f"{found['ms_per_step']['median']:.2f}",
                    f"{same['identical']}/{same['requests']}" if same else "-",
                    f"{found['repeated_4grams']:.0%}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def shown_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the results file, without this machine's folders."""
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    for name in ("model", "prompts", "text"):
        settings[name] = shown_path(str(settings[name]))
    return {**settings, "weight_bytes": weight_bytes(args.model), "ignore_eos": True}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "seed": 0,
        "enforce_eager": args.eager,
        # Every round reads its prompts, like the first.
        "enable_prefix_caching": False,
    }
    if args.max_model_len:
        base["max_model_len"] = args.max_model_len
    settings = {
        name: decoder_settings(
            name, base, args.prompts, args.ppd_config, args.ngram_config
        )
        for name in args.decoders
    }
    card = environment_card(engine_environment(args.in_process))
    if card["load_average"] > 0.5:
        say(
            f"note: other programs are running (load average {card['load_average']}); "
            "figures from a busy machine mislead"
        )
    most = max(args.num_prompts, args.waves * max(args.batch))
    lengths = text_lengths(most, args.max_tokens, args.range_ratio)
    prompts: list[list[int]] = []
    wanted = [Cell(batch, t) for t in args.temperature for batch in args.batch]
    measured: dict[Cell, list[dict[str, Measured]]] = {cell: [] for cell in wanted}
    results: dict[str, Any] = {}
    for start in range(1, args.starts + 1):
        ordered = dict(reversed(settings.items())) if start % 2 == 0 else settings
        with running(ordered, args.in_process, say) as engines:
            if not prompts:
                first = next(iter(engines.values()))
                prompts = encode_prompts(first, args.text, most, args.prompt_tokens)
            for cell in wanted:
                say(
                    f"measuring batch {cell.batch}, temperature {cell.temperature:g}, "
                    f"start {start} of {args.starts}"
                )
                count = max(args.num_prompts, args.waves * cell.batch)
                measured[cell].append(
                    measure_cell(
                        engines, prompts[:count], cell, lengths[:count], args.rounds
                    )
                )
            cards = {name: engines[name].card for name in settings}
        shown = {**shown_settings(args), "starts": start}
        cells = [report(cell, starts) for cell, starts in measured.items()]
        results = document("compare_decoders", card, cards, shown, cells)
        if args.out:
            # What there is, should the run be stopped.
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, results)
    return results


def heading(results: dict[str, Any]) -> str:
    """Where the figures come from, above the table."""
    machine = results["environment"]
    engine = next(iter(results["engines"].values()))
    workers = len(engine["worker_cpus"])
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores, {workers} of them for "
        f"vLLM's worker; load average {machine['load_average']} before the run\n"
        f"vLLM {engine['vllm']} on {engine['device']}, torch {engine['torch']}, "
        f"{engine['dtype']}, {'eager' if engine['eager'] else 'compiled'}\n"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        results = run(args)
    except (ValueError, EngineFailedError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    print(heading(results))
    print(table(results["cells"]))
    if args.out:
        say(f"written to {args.out}")
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
