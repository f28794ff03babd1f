"""Where a decode step's time goes: plain vLLM, PPD, and plain with as many rows.

A PPD step of one request carries several rows. Plain vLLM carries as many when it
decodes that many requests at once. Two engines take turns, and PPD's is measured with
and without drafts:

    plain x1   one request, one row
    plain xR   R requests of the same context, R rows
    ppd x1     one request, R rows
    off x1     PPD at draft length 0, one row
    off xR     the same, R requests

What PPD adds is its step minus the plain step of equal rows; what it adds where it does
not speculate, `off` minus plain. Parts of a step are timed by wrapping methods of the
V1 model runner (a few microseconds each, so parts are slightly long). Prompts are
random tokens; how many draft tokens are accepted does not matter here. Engine cores run
in the front end's process with one thread; figures are medians over steps, then turns.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.json

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import running
from published import save_trees
from results import (
    Spread,
    add_model_arguments,
    environment_card,
    finish,
    parser_of,
    results_document,
)

from vllm_ppd.cli.engines import engine_settings

# Method of the runner (or of what hangs on it) -> the part of a step it is.
PARTS = {
    "_prepare_inputs": "prepare",
    "_build_attention_metadata": "attention metadata",
    "_model_forward": "forward",
    "_sample": "sample and verify",
    "_bookkeeping_sync": "bookkeeping",
    "propose_draft_token_ids": "propose",
}
WARM_UP_STEPS = 12


class Clock:
    """Accumulates seconds per part over one step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.parts[part] = self.parts.get(part, 0.0) + spent

        setattr(owner, name, timed)


def instrument(llm: Any) -> None:
    """Time the parts of the steps; runs in the engine's process."""
    core = llm.llm_engine.engine_core.engine_core
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    clock = Clock()
    clock.wrap(core.scheduler, "schedule", "scheduler")
    clock.wrap(core.scheduler, "update_from_output", "scheduler")
    clock.wrap(runner.model, "compute_logits", "LM head")
    for name, part in PARTS.items():
        if hasattr(runner, name):
            clock.wrap(runner, name, part)
    for layer in runner.compilation_config.static_forward_context.values():
        clock.wrap(layer.impl, "forward", "attention")
    llm.step_clock = clock


def measure(llm: Any, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Median seconds of a decode step and of its parts; in the engine's process."""
    from vllm import SamplingParams, TokensPrompt

    engine, clock = llm.llm_engine, llm.step_clock
    vocabulary = engine.model_config.get_vocab_size()
    limit = engine.model_config.max_model_len - context - 1
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=limit)
    for index in range(batch):
        # Different prompts, so that no prefix is shared.
        ids = [(7919 * (i + 31 * index) + 13) % vocabulary for i in range(context)]
        engine.add_request(f"{index}", TokensPrompt(prompt_token_ids=ids), params)
    totals: list[float] = []
    parts: list[dict[str, float]] = []
    emitted: list[int] = []
    while len(totals) < steps + WARM_UP_STEPS:
        clock.parts = {}
        began = time.perf_counter()
        outputs = engine.step()
        if len(outputs) < batch:
            continue  # still reading prompts
        totals.append(time.perf_counter() - began)
        parts.append(clock.parts)
        emitted.append(sum(len(o.outputs[0].token_ids) for o in outputs))
    engine.abort_request([f"{index}" for index in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    parts = parts[WARM_UP_STEPS:]
    tokens = emitted[-1] - emitted[WARM_UP_STEPS - 1]
    return {
        "step": statistics.median(totals[WARM_UP_STEPS:]),
        "tokens_per_step": tokens / steps / batch,
        "parts": {
            name: statistics.median(part.get(name, 0.0) for part in parts)
            for name in sorted({name for part in parts for name in part})
        },
    }


def summarise(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Milliseconds: medians over turns, with the fastest and slowest turn."""
    return {
        name: {
            "step_ms": Spread.of([1000 * r["step"] for r in results]).to_dict(),
            "tokens_per_step": results[0]["tokens_per_step"],
            "parts_ms": {
                part: round(
                    1000 * statistics.median(r["parts"].get(part, 0) for r in results),
                    4,
                )
                for part in results[0]["parts"]
            },
        }
        for name, results in turns.items()
    }


def speedups(turns: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Tokens per second of PPD against plain, one request each, turn by turn."""
    pairs = zip(turns["plain x1"], turns["ppd x1"], strict=True)
    ratios = [p["tokens_per_step"] * a["step"] / p["step"] for a, p in pairs]
    return Spread.of(ratios).to_dict(3)


def show(cell: dict[str, Any]) -> None:
    decoders = cell["decoders"].values()
    print(f"\ncontext {cell['context']}")
    print(f"{'ms':22}" + "".join(f"{name:>12}" for name in cell["decoders"]))
    rows = [("step", [d["step_ms"]["median"] for d in decoders])]
    for part in sorted({part for d in decoders for part in d["parts_ms"]}):
        rows.append((part, [d["parts_ms"].get(part, 0.0) for d in decoders]))
    for name, values in rows:
        print(f"{name:22}" + "".join(f"{value:12.3f}" for value in values))
    print(f"tokens/s against plain x1: {cell['ppd_speedup']}", flush=True)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from vllm_ppd.search.acceptance import AcceptanceModel

    rows, cells = args.rows, []
    with tempfile.TemporaryDirectory() as folder:
        length = max(args.context) + 8 * args.steps + 512
        base, _ = engine_settings(args.model, args.dtype, args.eager, length)
        # Longer than the model was trained for: time is what counts here.
        base["hf_overrides"] = {"max_position_embeddings": length}
        trees = AcceptanceModel.of_folder(Path(args.prompts), 3).marginal
        file, draft_length = save_trees(trees, rows, Path(folder))
        ppd = {
            "method": "ppd",
            "model": args.prompts,
            "tree": file,
            "profile": "none",
            "online": False,
            "ngram": False,
        }
        common = {"in_process": True, "environment": {"OMP_NUM_THREADS": "1"}}
        options = {
            "plain": {"settings": base, **common},
            "ppd": {"settings": {**base, "speculative_config": ppd}, **common},
        }
        with running(options) as engines:
            for engine in engines.values():
                engine.run("step_cost:instrument")
            for context in args.context:
                turns: dict[str, list[dict[str, Any]]] = {}
                for _ in range(args.rounds):
                    for name, engine_name, batch, held in (
                        ("plain x1", "plain", 1, None),
                        (f"plain x{rows}", "plain", rows, None),
                        ("ppd x1", "ppd", 1, draft_length),
                        ("off x1", "ppd", 1, 0),
                        (f"off x{rows}", "ppd", rows, 0),
                    ):
                        engine = engines[engine_name]
                        if held is not None:
                            engine.run("engines:hold", draft_length=held)
                        task = {"batch": batch, "context": context, "steps": args.steps}
                        measured = engine.run("step_cost:measure", **task)
                        turns.setdefault(name, []).append(measured)
                cells.append(
                    {
                        "context": context,
                        "decoders": summarise(turns),
                        "ppd_speedup": speedups(turns),
                    }
                )
                show(cells[-1])
    return cells


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add_model_arguments(parser)
    add("--context", type=int, nargs="+", default=[128, 1024, 4096])
    add("--rows", type=int, default=4, help="rows of a PPD step")
    add("--steps", type=int, default=40, help="per turn")
    add("--rounds", type=int, default=15, help="turns of each engine")
    add("--eager", action="store_true", help="do not compile")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.context, args.steps, args.rounds, args.eager = [16], 4, 1, True
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    card = environment_card()
    finish(results_document("step_cost", card, vars(args), run(args)), args.out)


if __name__ == "__main__":
    main()
