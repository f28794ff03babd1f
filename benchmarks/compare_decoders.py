"""Is PPD faster than plain vLLM, and than vLLM's n-gram speculation? By how much?

    python benchmarks/compare_decoders.py --dry-run
    python benchmarks/compare_decoders.py --out benchmarks/results/NAME.json
    python benchmarks/compare_decoders.py --model MODEL --prompts FOLDER \
        --data TEXTS.jsonl --batch 1,4,16 --temperature 0,0.7,1.0 --rounds 5
    python benchmarks/compare_decoders.py --decoders plain,ppd \
        --other CHECKOUT --other-prompts FOLDER    # this code against another version

All decoders write the same numbers of tokens for the same held-out prompts (end of
text is ignored), alternating A B C A B C ... so that a change in the machine's state
affects all of them. Each speed is tokens per second from the first request on, prompts
included, as long as a request that has finished is followed by another; ratios are
taken within a round, then summarised. Two engines that run the very same code may
differ by several per cent: --starts starts all of them anew, every other time in the
opposite order. Small models loop when decoded greedily, and loops are easy to draft:
compare greedy figures with "repeated" (share of 4-grams seen before) and with sampling.

The last line of standard output is the results as one compact JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engines import running
from harness import (
    DECODERS,
    Cell,
    Measured,
    decoder_settings,
    encode_prompts,
    measure_cell,
    report_cell,
    text_lengths,
)
from results import (
    ROOT,
    add_model_arguments,
    add_text_arguments,
    environment_card,
    finish,
    markdown,
    numbers,
    parser_of,
    results_document,
    say,
)

from vllm_ppd.cli.engines import EngineFailedError, engine_settings
from vllm_ppd.files import write_json


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add_model_arguments(parser)
    add_text_arguments(parser)
    # What is compared
    usual = ["plain", "ppd", "ngram"]
    add("--decoders", type=numbers(str), default=usual, help=",".join(DECODERS))
    add("--ppd-config", type=json.loads, default={}, metavar="JSON", help="more keys")
    add("--ngram-config", type=json.loads, default={}, metavar="JSON", help="more keys")
    add("--other", type=Path, metavar="CHECKOUT", help="add the PPD of this checkout")
    add("--other-prompts", metavar="FOLDER", help="its prompt tokens (default: ours)")
    # The work
    add("--num-prompts", type=int, default=16, help="requests per round, at least")
    add("--waves", type=int, default=3, help="at least so many times the batch")
    add("--range-ratio", type=float, default=0.5, help="spread of --max-tokens")
    add("--batch", type=numbers(int), default=[1, 4, 16], help="requests at a time")
    add("--rounds", type=int, default=5, help="alternating rounds of each start")
    add("--starts", type=int, default=1, help="times that the engines are started")
    # The engines
    add("--max-model-len", type=int, help="as in vllm serve")
    add("--eager", action="store_true", help="do not compile the model")
    add("--in-process", action="store_true", help="engine core in the front end")
    args = parser.parse_args(argv)
    if args.other and "other" not in args.decoders:
        args.decoders = [*args.decoders, "other"]
    if args.dry_run:
        args.num_prompts, args.prompt_tokens, args.max_tokens = 2, 16, 8
        args.batch, args.temperature, args.rounds = [1, 2], [0.0, 1.0], 3
        args.eager, args.waves = True, 1
    if set(args.decoders) - set(DECODERS):
        parser.error(f"--decoders: choose from {', '.join(DECODERS)}")
    if args.rounds * args.starts < 3:
        parser.error("--rounds times --starts must be at least 3, to show a spread")
    if not 0 <= args.range_ratio < 1:
        parser.error("--range-ratio must be at least 0 and less than 1")
    counts = (args.num_prompts, args.waves, args.rounds, args.starts)
    if min(*args.batch, *counts) < 1:
        parser.error(
            "--batch, --num-prompts, --waves, --rounds and --starts must be at least 1"
        )
    if args.other is None and "other" in args.decoders:
        parser.error("the decoder 'other' needs --other CHECKOUT")
    if args.other and not (args.other / "vllm_ppd/engine/generation.py").exists():
        parser.error(
            f"--other is {args.other}, which is no checkout of this project, or one "
            "from before vllm_ppd/engine/generation.py"
        )
    return args


def engine_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of `Engine` by decoder."""
    # Without a prefix cache every round reads its prompts, like the first.
    base, _ = engine_settings(args.model, args.dtype, args.eager, args.max_model_len)
    options = {}
    for name in args.decoders:
        prompts, checkout = args.prompts, ROOT
        if name == "other":
            prompts, checkout = args.other_prompts or prompts, args.other.resolve()
        settings = decoder_settings(
            name, base, prompts, args.ppd_config, args.ngram_config
        )
        options[name] = {
            "settings": settings,
            "in_process": args.in_process,
            "checkout": checkout,
        }
    return options


def table(cells: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one row per condition and decoder."""
    rows: list[dict[str, Any]] = []
    speeds = "{median:,.0f} ({min:,.0f}-{max:,.0f})"
    ratios = "{median:.2f}x ({min:.2f}-{max:.2f})"
    for cell in cells:
        for name, figures in cell["decoders"].items():
            same, ratio = figures["same_ids_as_plain"], figures.get("ratio")
            other = figures.get("ratio_other", {}).get("median")
            promised = figures.get("promised_length", {}).get("median")
            alike = f"{same['identical']}/{same['requests']}" if same else "-"
            row = {
                "batch": cell["batch"],
                "temperature": f"{cell['temperature']:g}",
                "decoder": name,
                "tokens/s (min-max)": speeds.format(**figures["tokens_per_s"]),
                "against plain (min-max)": ratios.format(**ratio) if ratio else "-",
                "against other": f"{other:.3f}" if other else "-",
                "acceptance length": f"{figures['acceptance_length']['median']:.2f}",
                "promised": f"{promised:.2f}" if promised else "-",
                "ms/step": f"{figures['ms_per_step']['median']:.2f}",
                "ids as plain": alike,
                "repeated": f"{figures['repeated_4grams']:.0%}",
            }
            rows.append(row)
    return markdown([list(rows[0]), *(list(row.values()) for row in rows)])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    card = environment_card()
    if card["load_average"] > 0.5:
        say(f"note: the machine is busy (load average {card['load_average']})")
    count = max(args.num_prompts, args.waves * max(args.batch))
    lengths = text_lengths(count, args.max_tokens, args.range_ratio)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = encode_prompts(tokenizer, args.data, count, args.prompt_tokens)
    options = engine_options(args)
    cells = [Cell(batch, t) for t in args.temperature for batch in args.batch]
    measured: dict[Cell, list[dict[str, Measured]]] = {cell: [] for cell in cells}
    results: dict[str, Any] = {}
    for start in range(1, args.starts + 1):
        ordered = dict(reversed(options.items())) if start % 2 == 0 else options
        with running(ordered) as engines:
            menus = {name: engine.card["menu"] for name, engine in engines.items()}
            cards = {name: engines[name].card for name in options}
            for cell in cells:
                say(
                    f"measuring batch {cell.batch}, temperature {cell.temperature:g}, "
                    f"start {start} of {args.starts}"
                )
                count = max(args.num_prompts, args.waves * cell.batch)
                work = prompts[:count], cell, lengths[:count], args.rounds
                measured[cell].append(measure_cell(engines, *work, menus))
                reports = [report_cell(*pair) for pair in measured.items() if pair[1]]
                so_far = {**vars(args), "starts": start}
                results = results_document(
                    "compare_decoders", card, so_far, reports, engines=cards
                )
                if args.out:  # what there is, should the run be stopped
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    write_json(args.out, results)
                say(table(results["cells"][cells.index(cell) :][:1]))
    return results


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        results = run(args)
    except (ValueError, EngineFailedError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    print(table(results["cells"]))
    finish(results, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
