"""Where a decode step's time goes: plain vLLM, PPD, and plain with as many rows.

A PPD step of one request carries several rows. Plain vLLM carries as many when it
decodes that many requests at once, so three engines are compared:

    plain x1   one request, one row
    plain xR   R requests of the same context, R rows
    ppd x1     one request, R rows
    off x1     PPD with a plan that does not speculate, one row
    off xR     the same, R requests

What PPD adds is its step minus the plain step of equal rows; what it adds where it does
not speculate, `off` minus plain. Parts of a step are timed
by wrapping the model runner's methods (a few microseconds each, so parts are slightly
long). Prompts are random tokens; how many guesses are accepted does not matter here.
Each engine is an eager or compiled LLM in its own process with one thread; they take
turns, and figures are medians over steps, then over turns.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
    python benchmarks/step_cost.py --hidden 768 --layers 12 --rows 4 \
        --replay benchmarks/data/vicuna-7b-v1.3.json     # speed at that acceptance

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import environment_card
from replay import replay_acceptance
from step_cost_report import show, speedups, summarise

from vllm_ppd.files import write_json
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.defaults import acceptance_of
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_search import optimal_policy
from vllm_ppd.trees.menu import Tier, TreePlan

ROOT = Path(__file__).resolve().parent.parent
# Method of the runner (or of what hangs on it) -> the part of a step it is.
PARTS = {
    "_prepare_inputs": "prepare",
    "_build_attention_metadata": "attention metadata",
    "_model_forward": "forward",
    "_sample": "sample and verify",
    "_bookkeeping_sync": "bookkeeping",
    "propose_draft_token_ids": "propose",
}


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


def serve(pipe: Any, engine: dict[str, Any], acceptance: str | None) -> None:
    """Engine process: measure one (batch, context) at a time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from vllm import LLM

    llm = LLM(**engine)
    if acceptance:
        replay_acceptance(AcceptanceStats.load(acceptance))
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
    if hasattr(runner, "_ppd_mover"):
        clock.wrap(runner._ppd_mover, "move", "KV moves")
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        pipe.send(measure(llm, clock, **task))
    # vLLM's own way out would report every thread that is still there.
    os._exit(0)


def measure(
    llm: Any, clock: Clock, batch: int, context: int, steps: int
) -> dict[str, Any]:
    """Median seconds of a decode step and of its parts, and rows and tokens of it."""
    from vllm import SamplingParams, TokensPrompt

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=10**6)
    params.max_tokens = engine.model_config.max_model_len - context - 1
    for index in range(batch):
        # Different prompts, so that no prefix is shared.
        ids = [(7919 * (i + 31 * index) + 13) % vocabulary for i in range(context)]
        engine.add_request(f"{index}", TokensPrompt(prompt_token_ids=ids), params)
    tokens = 0
    totals: list[float] = []
    parts: list[dict[str, float]] = []
    warm_up = 12
    while len(totals) < steps + warm_up:
        clock.parts = {}
        began = time.perf_counter()
        outputs = engine.step()
        if len(outputs) < batch:
            continue  # still reading prompts
        totals.append(time.perf_counter() - began)
        parts.append(clock.parts)
        if len(totals) == warm_up:
            tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs) - tokens
    engine.abort_request([f"{index}" for index in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    names = {name for part in parts for name in part}
    return {
        "step": statistics.median(totals[warm_up:]),
        "tokens_per_step": tokens / steps / batch,
        "parts": {
            name: statistics.median(part.get(name, 0.0) for part in parts[warm_up:])
            for name in sorted(names)
        },
    }


class Engine:
    def __init__(self, engine: dict[str, Any], acceptance: str | None = None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, engine, acceptance), daemon=True
        )
        self.process.start()
        if self.pipe.recv() != "ready":
            raise RuntimeError("the engine did not start")

    def measure(self, **task: Any) -> dict[str, Any]:
        self.pipe.send(task)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def sized_model(args: argparse.Namespace, folder: str) -> tuple[str, str]:
    """A random model of the demo's kind in another size, with matching prompts."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
    from vllm_ppd.prompt_tokens.tokens import PromptTokens

    config = LlamaConfig.from_pretrained(args.model)
    config.update(
        {
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 11 // 4,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden // 64,
            "num_key_value_heads": max(1, args.hidden // 128),
        }
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(f"{folder}/model")
    AutoTokenizer.from_pretrained(args.model).save_pretrained(f"{folder}/model")
    table = torch.randn(3, 1, args.hidden) * 0.02
    base = BaseModelFingerprint.of_folder(f"{folder}/model")
    PromptTokens(table, base).save(f"{folder}/prompts")
    return f"{folder}/model", f"{folder}/prompts"


def run(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_KVCACHE_SPACE="1",
        OMP_NUM_THREADS="1",
    )
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = str(args.model), str(args.prompts)
        if args.hidden:
            model, prompts = sized_model(args, folder)
        length = max(args.context) + 8 * args.steps + 512
        base = {
            "model": model,
            "dtype": args.dtype,
            "max_model_len": length,
            # Longer than the model was trained for: time is what counts here.
            "hf_overrides": {"max_position_embeddings": length},
            "enforce_eager": args.eager,
            "enable_prefix_caching": False,
        }
        count = args.rows
        if args.replay:
            stats = AcceptanceStats.load(args.replay)
        else:
            stats = acceptance_of(Path(prompts), 3)
        # The same trees in every step: a fixed number of rows, prompt rows' guesses.
        found = optimal_policy(stats, LatencyCurve.constant(1.0), count)
        found.policy.save(f"{folder}/trees.json")
        speculative: dict[str, Any] = {
            "model": f"ppd:{prompts}",
            "tree": f"{folder}/trees.json",
        }
        write_json(f"{folder}/off.json", TreePlan((Tier(None),)).to_dict())
        silent = {**speculative, "tree": f"{folder}/off.json"}
        plain = Engine(base)
        speculating = Engine(
            {**base, "speculative_config": speculative},
            str(args.replay) if args.replay else None,
        )
        off = Engine({**base, "speculative_config": silent})
        cells = []
        for context in args.context:
            turns: dict[str, list[dict[str, Any]]] = {}
            for _ in range(args.rounds):
                for name, engine, batch in (
                    ("plain x1", plain, 1),
                    (f"plain x{count}", plain, count),
                    ("ppd x1", speculating, 1),
                    ("off x1", off, 1),
                    (f"off x{count}", off, count),
                ):
                    task = {"batch": batch, "context": context, "steps": args.steps}
                    turns.setdefault(name, []).append(engine.measure(**task))
            cells.append(
                {
                    "context": context,
                    "decoders": summarise(turns),
                    "ppd_speedup": speedups(turns["plain x1"], turns["ppd x1"]),
                }
            )
            show(cells[-1])
        for engine in (plain, speculating, off):
            engine.close()
    return {
        "format": "ppd_step_cost",
        "format_version": 1,
        "environment": environment_card(),
        "settings": {
            "rows": count,
            "dtype": args.dtype,
            "eager": args.eager,
            "steps": args.steps,
            "rounds": args.rounds,
            "hidden": args.hidden or "demo model",
            "layers": args.layers if args.hidden else "demo model",
            "replayed acceptance": args.replay.stem if args.replay else None,
        },
        "cells": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo_model" / "model")
    parser.add_argument(
        "--prompts", type=Path, default=ROOT / "trained_prompts" / "demo"
    )
    parser.add_argument("--hidden", type=int, help="a random model of this width")
    parser.add_argument("--layers", type=int, default=6, help="and of this depth")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--rows", type=int, default=4, help="rows of a PPD step")
    parser.add_argument(
        "--replay",
        type=Path,
        help="accept guesses as often as this acceptance.json says, whatever they are",
    )
    parser.add_argument("--steps", type=int, default=40, help="per turn")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each engine")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = run(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, separators=(",", ":")))


if __name__ == "__main__":
    main()
