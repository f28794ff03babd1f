"""Plain vLLM and PPD on a GPU, at an acceptance that somebody published.

Models are shapes with random weights: time is what counts. PPD does all of its work,
but which guess is right is drawn by the odds of an acceptance table, here that of the
paper's Vicuna-7B. Decoders take turns on the same prompts:

    plain    vLLM alone
    ppd      the trees that PPD chooses by itself for each load
    ppd R    the best trees of R rows, whatever the load

Reported are tokens per second from the first request to the last token (prompts
included), the ratio to plain within a round, and the time between steps that all
requests share. vLLM's n-gram is missing: nobody published its acceptance for this text;
compare_decoders.py runs it for real.

    python benchmarks/gpu_decode.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_decode.py --dry-run    # tiny, on a CPU, interpreted

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT
from gpu_engine import TimedEngine
from gpu_timing import choose_device, finish
from stats import summarise

from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_search import optimal_policy

TABLE = ROOT / "benchmarks" / "data" / "vicuna-7b-v1.3.json"
# hidden, intermediate, layers, heads, KV heads, head size, vocabulary
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),  # Llama 3.2 1B
    "7b": (4096, 11008, 32, 32, 32, 128, 32000),  # Vicuna 7B
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),  # Llama 3.1 8B
    "13b": (5120, 13824, 40, 40, 40, 128, 32000),  # Vicuna 13B
    "tiny": (64, 128, 2, 4, 2, 32, 64),
}
# vLLM's V2 runner on a CPU needs Triton's interpreter and a backend for it.
INTERPRETED = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}


def make_model(shape: str, stats: AcceptanceStats, folder: Path) -> tuple[str, str]:
    """Folders of a configuration without weights, and of prompt tokens for it."""
    import torch
    from transformers import LlamaConfig

    from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
    from vllm_ppd.prompt_tokens.tokens import PromptTokens

    hidden, inner, layers, heads, kv_heads, size, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    model, prompts = folder / f"model-{shape}", folder / f"prompts-{shape}"
    config.save_pretrained(model)
    rows = torch.randn(stats.num_prompt_tokens, 1, hidden) * 0.02
    PromptTokens(rows, BaseModelFingerprint.of_folder(str(model))).save(prompts)
    stats.save(prompts / "acceptance.json")
    return str(model), str(prompts)


def kv_bytes(shape: str, tokens: int) -> int:
    """Memory for the keys and values of so many tokens, and a tenth to spare."""
    _, _, layers, _, kv_heads, size, _ = SHAPES[shape]
    return int(1.1 * tokens * layers * 2 * kv_heads * size * 2) + (1 << 28)


def engines_of(
    shape: str, stats: AcceptanceStats, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Any]]:
    """Arguments of `vllm.LLM` by decoder."""
    model, prompts = make_model(shape, stats, folder)
    base: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        # Near its longest a request gets fewer rows, of which there are no graphs.
        "max_model_len": max(args.contexts) + args.tokens + 2 + 4 * max_rows(args),
        "max_num_batched_tokens": 512 if args.dry_run else 8192,
        "enable_prefix_caching": False,
        "enforce_eager": args.dry_run,
        "seed": 0,
        # Several engines hold their memory at once.
        "gpu_memory_utilization": 0.2,
    }
    # The replayed table says nothing of earlier matches.
    ppd = {"method": "ppd", "model": prompts, "profile": "none", "ngram": False}
    found = {"plain": base, "ppd": {**base, "speculative_config": ppd}}
    for rows in args.rows:
        trees = folder / f"trees-{shape}-{rows}.json"
        curve = LatencyCurve.constant(1.0)
        optimal_policy(stats, curve, rows).policy.save(trees)
        fixed = {**ppd, "tree": str(trees)}
        found[f"ppd {rows}"] = {**base, "speculative_config": fixed}
    found = {name: each for name, each in found.items() if name in args.decoders}
    for name, each in found.items():
        cells = [cell for cell in cells_of(args) if takes_part(name, cell[1], args)]
        each["max_num_seqs"] = most = max((batch for _, batch in cells), default=1)
        # The rows of two steps lie behind their requests' texts until they are
        # verified.
        room = max((c * b for c, b in cells), default=1) + most * args.tokens
        each["kv_cache_memory_bytes"] = kv_bytes(
            shape, room + 4 * max(args.most_rows, 1024)
        )
    return found


def max_rows(args: argparse.Namespace) -> int:
    """Of any tree."""
    return max([*args.rows, 0 if args.dry_run else 64])


def takes_part(name: str, batch: int, args: argparse.Namespace) -> bool:
    """Whether a decoder is measured: fixed trees are about rows, not about crowds."""
    rows = int(name.split()[1]) if name.startswith("ppd ") else 1
    return rows == 1 or batch * rows <= args.most_rows


def cells_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(context, batch): every batch at the first context, then longer ones alone."""
    first, *longer = args.contexts
    return [(first, batch) for batch in args.batches] + [(n, 1) for n in longer]


def measure_shape(
    shape: str, stats: AcceptanceStats, args: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    table = stats.acceptance.tolist()
    engines: dict[str, TimedEngine] = {}
    cells = []
    try:
        for name, settings in engines_of(shape, stats, args, folder).items():
            accepted = None if name == "plain" else table
            engines[name] = TimedEngine(settings, accepted)
            if not args.together:
                engines[name].wait_ready()
        for name, engine in engines.items():
            if args.together:
                card = engine.wait_ready()
                say(f"{shape} {name}: started in {card['start_s']} s")
        for context, batch in cells_of(args):
            taking_part = {
                name: engine
                for name, engine in engines.items()
                if takes_part(name, batch, args)
            }
            task = {"batch": batch, "context": context, "tokens": args.tokens}
            rounds: dict[str, list[dict[str, float]]] = {n: [] for n in taking_part}
            for number in range(args.rounds + 1):
                for name, engine in taking_part.items():
                    figures = engine.decode(**task)
                    if number:  # the first is a warm-up
                        rounds[name].append(figures)
            cells.append(
                {
                    "shape": shape,
                    "context": context,
                    "batch": batch,
                    "decoders": summarise(rounds),
                }
            )
            show(cells[-1])
    finally:
        for engine in engines.values():
            engine.close()
    return cells


def show(cell: dict[str, Any]) -> None:
    for name, found in cell["decoders"].items():
        ratio = found.get("ratio", {"median": 1.0, "min": 1.0, "max": 1.0})
        print(
            f"{cell['shape']:5}{cell['context']:7}{cell['batch']:5}  {name:9}"
            f"{found['tokens_per_s']['median']:10.0f}"
            f"{found['step_ms']['median']:9.3f}"
            f"{found['tokens_per_step']['median']:8.2f}"
            f"{ratio['median']:8.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
            flush=True,
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["7b"], help="models")
    add("--batches", nargs="+", type=int, default=[1, 4, 16, 64], help="requests")
    add("--contexts", nargs="+", type=int, default=[128], help="tokens per prompt")
    add("--rows", nargs="*", type=int, default=[16, 64], help="of fixed trees")
    add("--most-rows", type=int, default=1024, help="of a step with fixed trees")
    add("--tokens", type=int, default=256, help="written per request")
    add("--rounds", type=int, default=3, help="turns of every decoder")
    add("--table", type=Path, default=TABLE, help="an acceptance.json to replay")
    add("--decoders", nargs="+", help="of plain, ppd and 'ppd R'; default: all")
    add("--dtype", default="bfloat16", help="as in vllm serve")
    add("--together", action="store_true", help="start all engines at once")
    add("--out", type=Path, help="write the JSON document here, too")
    add("--dry-run", action="store_true", help="tiny sizes; also without a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = choose_device(args.dry_run)
    if args.dry_run:
        args.shapes, args.batches, args.contexts, args.rows = ["tiny"], [2], [8], [6]
        args.tokens, args.rounds, args.dtype = 6, 1, "float32"
    if device.type == "cpu":
        # The engines' processes start with this one's path and environment.
        sys.path.insert(0, str(ROOT / "tests" / "triton_cpu_stub"))
        os.environ.update(INTERPRETED)
    names = ["plain", "ppd", *(f"ppd {rows}" for rows in args.rows)]
    args.decoders = args.decoders or names
    stats = AcceptanceStats.load(args.table)
    print("shape context batch decoder   tokens/s  ms/step  tok/step  vs plain")
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            cells += measure_shape(shape, stats, args, Path(folder))
    finish("ppd_gpu_decode", args, device, cells=cells)


if __name__ == "__main__":
    main()
