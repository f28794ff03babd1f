"""`vllm-ppd demo`: the same prompts with and without PPD, side by side.

Both engines stay up, in processes of their own, and take turns: one sleeps while the
other is measured. The texts are measured first and replayed afterwards, on one clock
and at a speed that can be read.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vllm_ppd.cli.demo_view import Comparison, replay, summary, verdict
from vllm_ppd.cli.engines import EngineProcess, engine_processes, engine_settings
from vllm_ppd.engine.generation import Generation
from vllm_ppd.hub import resolve_path
from vllm_ppd.train.settings import check_counts, check_temperature

# An idle vLLM worker on CPU polls for a second after its last step, on the very core
# that the next engine's worker is bound to.
_SETTLE_S = 1.2
# Measurements of each text, with both engines in turn; of slow texts only one.
_ROUNDS, _SLOW_S = 3, 4.0
QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in a few sentences why the sky is blue.",
    "List the planets of the solar system, each with one fact about it.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="Folder or hub id of a model.")
    text = "Folder or hub id of prompt tokens for it (default: known ones, or none)."
    add("--prompts", metavar="PATH", help=text)
    text = "A question to a chat model, else a text to continue; may be repeated "
    text += "(default: three questions)."
    add("--prompt", action="append", metavar="TEXT", help=text)
    add("--max-tokens", type=int, default=128, help="Of an answer (default: 128).")
    text = "Sampling temperature; 0 is greedy decoding (default: 0)."
    add("--temperature", type=float, default=0.0, help=text)
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="Data type; auto is the faster of bfloat16 and float32 on a CPU, and the "
        "checkpoint's own on a GPU (default: auto).",
    )
    add("--max-model-len", type=int, help="As in vllm serve.")
    text = "Do not compile the model: starts sooner, runs slower."
    add("--eager", action="store_true", help=text)


def check(args: argparse.Namespace) -> bool:
    """Whether the model has a chat template.

    Raises ValueError for arguments that cannot work together.
    """
    check_counts(args, "max_tokens")
    check_temperature(args.temperature)
    if "" in (args.prompt or ()):
        raise ValueError("--prompt is ''; expected a question or a text to continue")
    # Wrong names are refused before an engine starts.
    folder = resolve_path(args.model, allow_patterns=("*.json", "*.jinja"))
    if args.prompts is not None:
        resolve_path(args.prompts)
    files = (folder / "chat_template.jinja", folder / "tokenizer_config.json")
    chats = any("{%" in file.read_text() for file in files if file.exists())
    if not (chats or args.prompt):
        raise ValueError(
            f"{args.model} has no chat template, so it answers no questions; give a "
            "text that it continues with --prompt"
        )
    return chats


def start(engines: Sequence[EngineProcess]) -> str:
    """Start all engines, one after another; returns their data type.

    On a GPU each measures how much memory is free, and PPD how long its steps take.
    """
    return [engine.call("start") for engine in engines][-1]


def measure(
    pair: Sequence[EngineProcess],
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    params: dict[str, Any],
    rounds: int,
) -> list[Comparison]:
    """Time all prompts with each engine in turn, `rounds` times."""
    written: list[list[list[Generation]]] = [[[] for _ in ids] for _ in pair]
    for _ in range(rounds):
        for engine, texts in zip(pair, written, strict=True):
            time.sleep(_SETTLE_S)
            for prompt, generations in zip(ids, texts, strict=True):
                generations.append(engine.call("generate", prompt, params))
    return [
        Comparison(prompt, tuple(plain), tuple(ppd))
        for prompt, plain, ppd in zip(prompts, *written, strict=True)
    ]


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when both engines ran, whatever the comparison says."""
    # Here, because torch takes a second to import.
    import torch

    model, prompt_tokens, chats = args.model, args.prompts, check(args)
    prompts = args.prompt or QUESTIONS
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    settings, notes = engine_settings(model, args.dtype, args.eager, args.max_model_len)
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = 0.4  # of each engine
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > 0.5:
        notes.append(
            f"other programs use this machine (load average {load:.1f} per core), so "
            "the speeds below are unreliable"
        )
    mode = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    console.print(f"{model} with {prompt_tokens or 'PPD'}, {mode}", markup=False)
    for note in notes:
        console.print(f"note: {note}", style="yellow")
    ppd = {"speculative_config": {"method": "ppd", "model": prompt_tokens}}
    both = {"plain vLLM": settings, "vLLM with PPD": {**settings, **ppd}}
    params = {"temperature": args.temperature, "max_tokens": args.max_tokens}

    with engine_processes(both, "demo") as engines, console.status("") as spinner:

        def say(text: str) -> None:
            spinner.update(text)
            if not console.is_terminal:
                console.print(f"{text} ...")

        pair = list(engines.values())
        say(f"starting {' and then '.join(engines)}")
        dtype = start(pair)
        ids = pair[0].call("encode_questions" if chats else "encode", prompts)
        say("warming up")
        short = {**params, "max_tokens": min(32, args.max_tokens)}
        warm_up, _ = (engine.call("generate", ids[0], short) for engine in pair)
        say("measuring, each engine in turn")
        slow = args.max_tokens > _SLOW_S * warm_up.tokens_per_s
        rounds = 1 if slow else _ROUNDS
        shown = [f"{prompt}\n\n" if chats else prompt for prompt in prompts]
        comparisons = measure(pair, shown, ids, params, rounds)
    for comparison in comparisons:
        replay(console, comparison)
    console.print(summary(comparisons, args.temperature == 0))
    for line in verdict(comparisons, dtype, args.temperature):
        console.print(line, markup=False)
    return 0
