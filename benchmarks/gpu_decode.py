"""Plain vLLM and PPD on a GPU, at an acceptance that somebody published.

Models are shapes with random weights: time is what counts. PPD does all of its work,
but which draft token is right is drawn by the probabilities of an acceptance table,
here that of the paper's Vicuna-7B. Decoders take turns on the same prompts:

    plain    vLLM alone
    ppd      PPD as it is served: draft lengths follow load and measured speed
    ppd R    the best trees of R rows, whatever the load

Reported are tokens per second from the first request on until one ends (prompts
included), the ratio to plain within a round, and the median time of a step. vLLM's
n-gram is missing, because its acceptance was not published for this text;
compare_decoders.py runs it for real.

    python benchmarks/gpu_decode.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_decode.py --dry-run    # tiny, on a CPU, interpreted

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compare_decoders import table
from engines import Engine, running
from gpu_kernels import choose_device
from harness import Cell, measure_cell, report_cell
from published import SHAPES, TABLE, load_table, make_model, save_trees
from results import ROOT, environment_card, finish, parser_of, results_document

# vLLM's V2 runner on a CPU needs Triton's interpreter and a backend for it.
INTERPRETED = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "tests" / "triton_cpu_stub"),
}


def kv_bytes(shape: str, tokens: int) -> int:
    """Memory for the keys and values of so many tokens, and a tenth to spare."""
    _, _, layers, _, kv_heads, size, _ = SHAPES[shape]
    return int(1.1 * tokens * layers * 2 * kv_heads * size * 2) + (1 << 28)


def engine_options(
    shape: str, table: list[list[float]], args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Any]]:
    """Arguments of `Engine` by decoder."""
    model, prompts = make_model(shape, table, folder)
    base: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        # Near its longest a request gets fewer rows, of which there are no graphs.
        "max_model_len": max(args.contexts) + args.tokens + 2 + 4 * 64,
        "max_num_batched_tokens": 512 if args.dry_run else 8192,
        "enable_prefix_caching": False,
        "enforce_eager": args.dry_run,
        "seed": 0,
        # Several engines hold their memory at once.
        "gpu_memory_utilization": 0.2,
    }
    profile = "none" if args.dry_run else "auto"
    # The table says nothing of n-gram matches.
    ppd = {"method": "ppd", "model": prompts, "ngram": False, "profile": profile}
    settings = {"plain": base, "ppd": {**base, "speculative_config": ppd}}
    for rows in args.rows:
        file, _ = save_trees(table, rows, folder)
        fixed = {**ppd, "profile": "none", "online": False, "tree": file}
        settings[f"ppd {rows}"] = {**base, "speculative_config": fixed}
    options: dict[str, dict[str, Any]] = {}
    for name in args.decoders or settings:
        loads = [cell for cell in cells_of(args) if takes_part(name, cell[1], args)]
        largest = max((batch for _, batch in loads), default=1)
        # The rows of two steps lie behind their requests' texts until verified.
        room = max((c * b for c, b in loads), default=1) + largest * args.tokens
        room += 4 * max(args.max_step_rows, 1024)
        sizes = {
            "max_num_seqs": largest,
            "kv_cache_memory_bytes": kv_bytes(shape, room),
        }
        options[name] = {"settings": {**settings[name], **sizes}}
        if args.dry_run:
            options[name]["environment"] = INTERPRETED
    return options


def takes_part(name: str, batch: int, args: argparse.Namespace) -> bool:
    """Whether a decoder is measured: fixed trees are about rows, not about crowds."""
    rows = int(name.split()[1]) if name.startswith("ppd ") else 1
    return rows == 1 or batch * rows <= args.max_step_rows


def cells_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(context, batch): every batch at the first context, then longer ones alone."""
    first, *longer = args.contexts
    return [(first, batch) for batch in args.batches] + [(n, 1) for n in longer]


def measure_shape(
    shape: str, engines: Mapping[str, Engine], args: argparse.Namespace
) -> list[dict[str, Any]]:
    cells = []
    vocabulary = SHAPES[shape][-1]
    for number, (context, batch) in enumerate(cells_of(args)):
        # Different prompts, so that no prefix is shared.
        prompts = [
            [
                (7919 * (i + 31 * k + 1009 * number) + 13) % vocabulary
                for i in range(context)
            ]
            for k in range(batch)
        ]
        chosen = {n: e for n, e in engines.items() if takes_part(n, batch, args)}
        cell, lengths = Cell(batch, 0.0), [args.tokens] * batch
        measured = measure_cell(chosen, prompts, cell, lengths, args.rounds)
        report = report_cell(cell, [measured])
        cells.append({"shape": shape, "context": context, **report})
        print(f"{shape}, {context} tokens of context\n{table([report])}", flush=True)
    return cells


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["7b"], help="models")
    add("--batches", nargs="+", type=int, default=[1, 4, 16, 64], help="requests")
    add("--contexts", nargs="+", type=int, default=[128], help="tokens per prompt")
    add("--rows", nargs="*", type=int, default=[16, 64], help="of fixed trees")
    add("--max-step-rows", type=int, default=1024, help="of a step with fixed trees")
    add("--tokens", type=int, default=256, help="written per request")
    add("--rounds", type=int, default=3, help="turns of every decoder")
    add("--table", type=Path, default=TABLE, help="an acceptance table to replay")
    add("--decoders", nargs="+", help="of plain, ppd and 'ppd R'; default: all")
    add("--dtype", default="bfloat16", help="as in vllm serve")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.shapes, args.batches, args.contexts, args.rows = ["tiny"], [2], [8], [6]
        args.tokens, args.rounds, args.dtype = 6, 1, "float32"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if choose_device(args.dry_run).type == "cpu":
        # The interpreter is for the engines' processes.
        os.environ.pop("TRITON_INTERPRET", None)
    acceptance = load_table(args.table)
    card = environment_card()
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            options = engine_options(shape, acceptance, args, Path(folder))
            with running(options) as engines:
                for name, engine in engines.items():
                    if name != "plain":
                        engine.run("published:replay", table=acceptance)
                cells += measure_shape(shape, engines, args)
    finish(results_document("gpu_decode", card, vars(args), cells), args.out)


if __name__ == "__main__":
    main()
