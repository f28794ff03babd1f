"""What prompt tokens cost in memory: parameters, bytes on disk, weights, KV cache.

    python benchmarks/memory.py --out benchmarks/results/memory.json
    python benchmarks/memory.py --dry-run

Plain vLLM and vLLM with prompt tokens start in turn, each in a process of its own with
the engine core in it, and say after loading and after a batch of requests:

- weights: bytes of all parameters and buffers of the served model;
- KV blocks: how many the engine has, and the most that the requests held at a time (the
  rows of a step take slots beyond the text until they are accepted or given back);
- process: memory that is the process's alone (its USS), which has the interpreter,
  compiled code and scratch memory in it and varies from start to start;
- device: memory allocated on the GPU, if there is one.

The paper gives 0.0004 % of memory as the most that its prompt tokens add, for models
from 1.4 to 13 billion parameters; a model of few parameters is wider than it is large,
so its share is higher. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, environment_card, shown_path
from safetensors import safe_open
from stats import Spread

from vllm_ppd.files import write_json
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.tokens import TENSOR_FILE, PromptTokens

# Chen et al., table of the results: memory overhead of PPD, per cent.
PAPER_PERCENT = 0.0004
_USAGE = "vllm:kv_cache_usage_perc"


def model_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; shared ones count once.

    Packed weights are elsewhere on CPU, so only differences between engines mean much.
    """
    import itertools

    tensors = {
        tensor.data_ptr(): tensor
        for tensor in itertools.chain(model.parameters(), model.buffers())
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def checkpoint_size(folder: Path) -> tuple[int, int]:
    """(parameters, bytes) of a model folder's safetensors.

    Raises ValueError when it has none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no safetensors to count parameters in; expected a model's "
            "folder"
        )
    parameters = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                parameters += math.prod(tensors.get_slice(name).get_shape())
    return parameters, sum(file.stat().st_size for file in files)


def memory_now() -> dict[str, int]:
    """Bytes that this process has to itself, and on the GPU if there is one."""
    import psutil
    import torch

    found = {"process": psutil.Process().memory_full_info().uss}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.memory_allocated()
    return found


def serve(pipe: Any, settings: dict[str, Any], task: dict[str, Any]) -> None:
    """Engine process: load, run the requests, report, end."""
    # vLLM prints to standard output, which is for results.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        pipe.send(report(settings, **task))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def report(
    settings: dict[str, Any], requests: int, prompt_tokens: int, max_tokens: int
) -> dict[str, Any]:
    """Figures of one engine, in bytes and KV blocks."""
    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**settings)
    engine, config = llm.llm_engine, llm.llm_engine.vllm_config
    loaded = memory_now()
    weights, *_ = llm.apply_model(model_bytes)
    vocabulary = config.model_config.get_vocab_size()
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    for index in range(requests):
        # Different prompts, so that no block is shared, of different lengths, so that
        # not all reach a block's end at the same time.
        length = prompt_tokens + 16 * index
        ids = [(7919 * (i + 31 * index) + 13) % vocabulary for i in range(length)]
        engine.add_request(f"{index}", TokensPrompt(prompt_token_ids=ids), params)
    usage = 0.0
    while engine.has_unfinished_requests():
        engine.step()
        usage = max(usage, kv_usage(llm.get_metrics()))
    blocks = config.cache_config.num_gpu_blocks
    return {
        "vllm": vllm.__version__,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "weights": weights,
        "kv_blocks": blocks,
        "kv_block_tokens": config.cache_config.block_size,
        "kv_blocks_used": round(usage * blocks),
        "loaded": loaded,
        "after_requests": memory_now(),
    }


def kv_usage(metrics: Sequence[Any]) -> float:
    """The part of the KV cache in use, of vLLM's own metrics."""
    found = [metric.value for metric in metrics if metric.name == _USAGE]
    if not found:
        raise RuntimeError(f"vLLM has no metric {_USAGE}; adapt this benchmark to it")
    return max(found)


def run_engine(settings: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """One engine's report. Raises RuntimeError when it fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, settings, task))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "it ended without a word"
    finally:
        process.join()
    if isinstance(found, str):
        raise RuntimeError(f"an engine failed: {found}")
    return found


def files_of(folder: Path) -> dict[str, int]:
    """Bytes of each file in a prompt-token folder."""
    return {
        file.name: file.stat().st_size
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def compared(
    plain: Sequence[Mapping[str, Any]], ppd: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What PPD adds, over engines started in turn."""
    first, ours = plain[0], ppd[0]
    extra = ours["weights"] - first["weights"]
    block = first["kv_block_tokens"]
    processes = {
        when: Spread.of(
            [
                b[when]["process"] - a[when]["process"]
                for a, b in zip(plain, ppd, strict=True)
            ]
        ).to_dict(0)
        for when in ("loaded", "after_requests")
    }
    return {
        "weights": extra,
        "kv_blocks_fewer": first["kv_blocks"] - ours["kv_blocks"],
        "kv_tokens_used_more": block
        * (ours["kv_blocks_used"] - first["kv_blocks_used"]),
        "process": processes,
        "process_varies_by": max(r["loaded"]["process"] for r in plain)
        - min(r["loaded"]["process"] for r in plain),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    prompts = PromptTokens.load(args.prompts)
    parameters, size = checkpoint_size(resolve_path(args.model))
    card = environment_card()
    base = {
        "model": args.model,
        "seed": 0,
        "enforce_eager": args.eager,
        "disable_log_stats": False,  # metrics come with them
    }
    ppd = {"method": "ppd", "model": str(args.prompts), **args.ppd_config}
    settings = {"plain": base, "ppd": {**base, "speculative_config": ppd}}
    task = {
        "requests": args.requests,
        "prompt_tokens": args.prompt_tokens,
        "max_tokens": args.max_tokens,
    }
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for number in range(args.rounds):
        for name, options in settings.items():
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            reports[name].append(run_engine(options, task))
    trained = prompts.embeddings.numel()
    added = compared(**reports)
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": "memory",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": card,
        "settings": {
            "model": shown_path(args.model),
            "prompts": shown_path(str(args.prompts)),
            "ppd_config": args.ppd_config,
            "eager": args.eager,
            "rounds": args.rounds,
            **task,
        },
        "prompt_tokens": {
            "trained_parameters": trained,
            "model_parameters": parameters,
            "model_bytes": size,
            "percent_of_parameters": 100 * trained / parameters,
            "percent_of_weights": 100 * added["weights"] / size,
            "paper_percent": PAPER_PERCENT,
            "bytes_on_disk": (args.prompts / TENSOR_FILE).stat().st_size,
            "files": files_of(args.prompts),
        },
        "cells": [{"engines": reports, "added": added}],
    }


def show(results: Mapping[str, Any]) -> None:
    own = results["prompt_tokens"]
    added = results["cells"][0]["added"]
    digits = max(0, 2 - math.floor(math.log10(own["percent_of_parameters"])))
    print(
        f"{own['trained_parameters']:,} parameters trained, "
        f"{own['percent_of_parameters']:.{digits}f} % of the model's "
        f"{own['model_parameters']:,} (paper: {PAPER_PERCENT} %); "
        f"{own['bytes_on_disk']:,} bytes on disk\n"
        f"weights in the engine: {added['weights']:+,} bytes, "
        f"{own['percent_of_weights']:.{digits}f} % of {own['model_bytes']:,}\n"
        f"KV blocks: {-added['kv_blocks_fewer']:+}; the requests held "
        f"{added['kv_tokens_used_more']:+} tokens of KV cache at their peak\n"
        f"process: {added['process']['loaded']['median']:+,.0f} bytes when loaded, "
        f"{added['process']['after_requests']['median']:+,.0f} after the requests; "
        f"plain starts differ by {added['process_varies_by']:,}"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder or hub id")
    prompts = ROOT / "trained_prompts" / "demo"
    add("--prompts", type=Path, default=prompts, help="folder of prompt tokens")
    add(
        "--ppd-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more keys of PPD's speculative_config",
    )
    add("--requests", type=int, default=8, help="running at once")
    add("--prompt-tokens", type=int, default=64)
    add("--max-tokens", type=int, default=128)
    add("--rounds", type=int, default=3, help="starts of each engine")
    add("--eager", action="store_true", help="do not compile the model")
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--dry-run", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.rounds, args.requests, args.max_tokens, args.eager = 1, 2, 8, True
    for name in ("requests", "prompt_tokens", "max_tokens", "rounds"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}; expected 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        results = run(args)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    show(results)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
