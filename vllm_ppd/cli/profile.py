"""`vllm-ppd profile`: measure this machine's step latency for a model.

An engine measures at its first start; this command starts one beforehand and shows the
result. A profile is filed under all settings that change it: use those of serving.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_ppd.cli.engines import engine_processes
from vllm_ppd.config import PPDConfig
from vllm_ppd.hub import resolve_path
from vllm_ppd.search.latency import LatencyProfile, cache_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="Folder or hub id of the model to be served.")
    add("path", nargs="?", help="Folder or hub id of its prompt tokens, if any.")
    add(
        "--engine",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="Engine arguments that you serve with, as vLLM's Python API names them: "
        "--engine dtype=float32 tensor_parallel_size=2 enforce_eager=true.",
    )
    text = "Time budget of the measurement; more time gives finer curves."
    add("--budget", type=float, metavar="SECONDS", help=text)
    text = "Measure even if a profile is on file."
    add("--force", action="store_true", help=text)
    add("--out", metavar="FILE", help="Also write the profile here.")
    add("--overwrite", action="store_true", help="Allow --out to replace a file.")


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; raises ValueError for what cannot be one."""
    speculative = {
        "method": "ppd",
        "model": args.path,
        "profile": "measure" if args.force else "auto",
    }
    if args.budget is not None:
        speculative["measure_seconds"] = args.budget
    settings: dict[str, Any] = {"model": args.model, "speculative_config": speculative}
    settings |= key_values(args.engine, settings)
    # Without it the engine would leave room for two more beside it.
    return {"gpu_memory_utilization": 0.9, **settings}


def key_values(texts: list[str], taken: Container[str]) -> dict[str, Any]:
    """Values, JSON or words, by key; raises ValueError for what is not KEY=VALUE."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if not equals or not key.isidentifier():
            raise ValueError(
                f"{text!r} sets nothing; expected KEY=VALUE, such as dtype=float32"
            )
        if key in taken or key in found:
            raise ValueError(f"{text!r} sets what is set already; leave it out")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def check_target(name: str | None, overwrite: bool) -> None:
    """Raise ValueError unless the file of --out can, and may, be written."""
    if name is None:
        return
    file = Path(name).expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"--out is {name}; expected a file in an existing folder")
    if file.exists() and not overwrite:
        raise ValueError(
            f"--out is {name}, which exists already; choose another name, or replace "
            "it with --overwrite"
        )


def run(args: argparse.Namespace) -> int:
    """Exit status 0. Raises ValueError for unusable input, EngineFailedError else."""
    # Here, because torch takes a second to import.
    from vllm_ppd.prompt_tokens.tokens import PromptTokens

    settings = engine_settings(args)
    check_target(args.out, args.overwrite)
    # A bad value should not cost an engine's start.
    PPDConfig.from_speculative(settings["speculative_config"])
    resolve_path(args.model, allow_patterns=("config.json",))
    if args.path is not None:
        PromptTokens.load(resolve_path(args.path))
    console = Console(highlight=False, soft_wrap=True)
    console.print("Starting the engine, which measures before it serves ...")
    report = _report(settings)
    profile = LatencyProfile.from_dict(report["profile"])
    origin = "measured now" if report["measured"] else "on file; --force measures again"
    console.print(f"{cache_file(profile.key)} ({origin})")
    console.print("\nMilliseconds of a step, by running requests and rows of each:")
    console.print(profile_table(profile))
    if args.out:
        profile.save(Path(args.out).expanduser())
        console.print(f"A copy is in {args.out}.")
    return 0


def _report(settings: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, ask what it has measured or found on file, and end it."""
    with engine_processes({"profile": settings}, "profile") as engines:
        engine = engines["profile"]
        engine.call("start")
        return engine.call("report")


def profile_table(profile: LatencyProfile) -> Table:
    """Milliseconds of a step: a line per load, a column per row count."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("requests", justify="right", style="dim")
    for count in profile.rows:
        name = "1 row" if count == 1 else str(count)
        table.add_column(name, justify="right", no_wrap=True)
    for load, seconds in zip(profile.num_running, profile.seconds, strict=True):
        table.add_row(str(load), *(_milliseconds(each) for each in seconds))
    return table


def _milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1000 * seconds
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
