"""`vllm-ppd demo`: the same prompts with and without PPD, side by side.

Both engines stay up, in processes of their own, and take turns: one sleeps while the
other is measured. The texts are measured first and replayed afterwards, on one clock
and at a speed that can be read.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_ppd.cli.demo_view import Comparison, replay, summary, verdict
from vllm_ppd.cli.engines import EngineProcess, engine_processes, engine_settings
from vllm_ppd.engine.generation import Generation
from vllm_ppd.hub import resolve_path
from vllm_ppd.train.documents import find_documents
from vllm_ppd.train.settings import check_counts, check_temperature

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo_model" / "model"
PROMPTS = ROOT / "trained_prompts" / "demo"
TEXTS = ROOT / "demo_model" / "held_out.jsonl"

# An idle vLLM worker on CPU polls for a second after its last step, on the very core
# that the next engine's worker is bound to.
_SETTLE_S = 1.2
# Measurements of each text, with both engines in turn; of slow texts only one.
_ROUNDS, _SLOW_S = 3, 4.0
# Each engine's share of a GPU's memory.
_GPU_MEMORY_SHARE = 0.4
_EXCERPT_CHARACTERS = 700
# The head of a function or class, which asks for a body.
_HEAD = re.compile(r"^[ \t]*(?:async def|def|class) .*:[ \t]*$", re.M)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="Folder or hub id of a model (default: the demo model).")
    text = "Folder or hub id of prompt tokens for that model (default: the demo's)."
    add("--prompts", metavar="PATH", help=text)
    text = "Text to continue; may be repeated (default: excerpts of held-out text)."
    add("--prompt", action="append", metavar="TEXT", help=text)
    for flag, kind, value, text in (
        ("--num-prompts", int, 3, "Number of excerpts"),
        ("--max-tokens", int, 128, "Tokens to generate after each prompt"),
        ("--temperature", float, 0.0, "Sampling temperature; 0 is greedy decoding"),
    ):
        add(flag, type=kind, default=value, help=f"{text} (default: {value:g}).")
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


def check(args: argparse.Namespace) -> tuple[str, str | None]:
    """The model and prompt tokens to use.

    Raises ValueError for arguments that cannot work together.
    """
    check_counts(args, "num_prompts", "max_tokens")
    check_temperature(args.temperature)
    if "" in (args.prompt or ()):
        raise ValueError("--prompt is ''; expected a text to continue")
    if not args.model and not MODEL.is_dir():
        raise ValueError(
            f"there is no {MODEL}, which the demo uses by default; run it from a clone "
            "of the repository, or name a --model"
        )
    model, prompts = str(args.model or MODEL), args.prompts
    if not args.model:
        prompts = prompts or str(PROMPTS)
    # Wrong names are refused before an engine starts.
    resolve_path(model, allow_patterns=("config.json",))
    if prompts is not None:
        resolve_path(prompts)
    return model, prompts


def excerpts(path: Path, count: int) -> list[str]:
    """One excerpt each of `count` texts, spread over a file of {"text": ...} lines.

    Raises ValueError if the file is unusable or has too few texts.
    """
    texts = (str(document.read()) for document in find_documents(path))
    parts = [part for part in map(_excerpt, texts) if part is not None]
    if len(parts) < count:
        raise ValueError(
            f"{path} has {len(parts)} texts that are long enough for a prompt; lower "
            "--num-prompts"
        )
    return [parts[i * len(parts) // count] for i in range(count)]


def _excerpt(text: str) -> str | None:
    """A passage from inside the text that ends where a model can go on.

    Code ends after the head of a function or class, other text at the end of a line,
    without the line break, which many tokenizers join with what follows. None for a
    text too short. The beginning is skipped: it is often a licence notice.
    """
    earliest = max(len(text) // 4, min(300, len(text) // 2))
    head = _HEAD.search(text, earliest)
    end = head.end() if head else text.find("\n", earliest)
    if end < 80:
        return None
    start = max(0, end - _EXCERPT_CHARACTERS)
    # Begin with a whole line.
    start = text.find("\n", start, end) + 1 if start else 0
    return text[start:end].rstrip()


def start(engines: Sequence[EngineProcess]) -> str:
    """Start all engines; returns their data type."""
    import torch

    if torch.cuda.is_available():
        # One after another, as each measures how much memory is free.
        return [engine.call("start") for engine in engines][-1]
    for engine in engines:
        engine.send("start")
    # The last first: it speculates, so its settings are likelier to be refused.
    return [engine.receive() for engine in reversed(engines)][-1]


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

    model, prompt_tokens = check(args)
    prompts = args.prompt or excerpts(TEXTS, args.num_prompts)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    settings, notes = engine_settings(model, args.dtype, args.eager, args.max_model_len)
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = _GPU_MEMORY_SHARE
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
        say(f"starting {' and '.join(engines)}")
        dtype = start(pair)
        ids = pair[0].call("encode", prompts)
        say("warming up")
        warm_ups = [engine.call("generate", ids[0], params) for engine in pair]
        say("measuring, each engine in turn")
        rounds = 1 if warm_ups[0].seconds > _SLOW_S else _ROUNDS
        comparisons = measure(pair, prompts, ids, params, rounds)
    for comparison in comparisons:
        replay(console, comparison)
    console.print(summary(comparisons, args.temperature == 0))
    for line in verdict(comparisons, dtype, args.temperature):
        console.print(line, markup=False)
    return 0
