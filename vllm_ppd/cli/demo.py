"""`vllm-ppd demo`: the same prompts with and without PPD, side by side.

Both engines stay up, in processes of their own, and take turns: one sleeps while the
other is measured. Small models write faster than anyone reads, so their runs are
measured first and replayed slowly; slow ones are shown as they write.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ppd.hub import resolve_path

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_ppd.cli.demo_report import Comparison, NearTie
    from vllm_ppd.cli.engines import EngineProcess
    from vllm_ppd.cli.generation import Generation

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo_model" / "model"
PROMPTS = ROOT / "trained_prompts" / "demo"
TEXTS = ROOT / "demo_model" / "held_out.jsonl"

# Seconds of one text from which watching it being written beats a replay.
WATCHABLE_S = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model folder or hub id (default: the demo's)")
    parser.add_argument(
        "--prompts",
        metavar="PATH",
        help="folder or hub id of prompt tokens for that model (default: the demo's)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, may be repeated (default: held-out excerpts)",
    )
    parser.add_argument(
        "--num-prompts", type=int, default=3, help="how many excerpts (default 3)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="length of a text (default 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 always takes the likeliest token (default); above 0 samples",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="how often each text is timed, in alternation (default 3)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="auto is the checkpoint's own (default); float32 has no near-ties",
    )
    parser.add_argument("--max-model-len", type=int, help="as in vllm serve")
    parser.add_argument(
        "--eager",
        action="store_true",
        help="do not compile the model: starts sooner, runs slower",
    )


def check(args: argparse.Namespace) -> tuple[str, str]:
    """The model and prompt tokens to use.

    Raises ValueError for arguments that cannot work together.
    """
    for name in ("num_prompts", "max_tokens", "rounds"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(args, name)}; expected at least 1")
    if args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}; expected 0 or more")
    if args.model and not args.prompts:
        raise ValueError(
            "--model is given without --prompts; prompt tokens belong to one model, so "
            "name those trained for it"
        )
    for given, folder in ((args.model, MODEL), (args.prompts, PROMPTS)):
        if not given and not folder.is_dir():
            raise ValueError(
                f"there is no {folder}, which the demo uses by default; run it from a "
                "clone of the repository, or name a --model and its --prompts"
            )
    model, prompts = str(args.model or MODEL), str(args.prompts or PROMPTS)
    # A name that leads nowhere should not cost an engine's start.
    resolve_path(model, allow_patterns=("config.json",))
    resolve_path(prompts)
    return model, prompts


class Narrator:
    """Says what is going on: a spinner on a terminal, lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[Any]:
        """While the block runs; yields a function that changes the text."""
        if not self.console.is_terminal:
            print(f"{text} ...", flush=True)
            yield lambda new: print(f"{new} ...", flush=True)
            return
        from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), "{task.description}", TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(text, total=None)
            yield lambda new: progress.update(task, description=new)


def measure(
    pair: Sequence[EngineProcess],
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    params: dict[str, Any],
    rounds: int,
) -> list[Comparison]:
    """Time all prompts with each engine in turn, `rounds` times."""
    from vllm_ppd.cli.demo_report import Comparison
    from vllm_ppd.cli.engines import settle

    written: list[list[list[Generation]]] = [[[] for _ in ids] for _ in pair]
    for _ in range(rounds):
        for engine, texts in zip(pair, written, strict=True):
            settle()
            for prompt, found in zip(ids, texts, strict=True):
                found.append(engine.generate([prompt], params).requests[0])
    return [
        Comparison(prompt, tuple(plain), tuple(ppd))
        for prompt, plain, ppd in zip(prompts, *written, strict=True)
    ]


def watch(
    console: Console,
    pair: Sequence[EngineProcess],
    prompt: str,
    ids: Sequence[int],
    params: dict[str, Any],
) -> Comparison:
    """Time one prompt once with each engine, showing the text as it is written."""
    from rich.live import Live

    from vllm_ppd.cli.demo_report import Comparison
    from vllm_ppd.cli.demo_view import TITLES, side_by_side
    from vllm_ppd.cli.engines import settle
    from vllm_ppd.cli.generation import Generation

    texts = {title: Generation(()) for title in TITLES}
    with Live(console=console, auto_refresh=False, transient=True) as view:

        def show(title: str) -> None:
            plain, ppd = texts.values()
            note = f"{title} is writing"
            view.update(
                side_by_side(console, prompt, plain, ppd, math.inf, note, title),
                refresh=True,
            )

        for title, engine in zip(TITLES, pair, strict=True):
            show(title)
            settle()

            def grow(steps: list[Any], title: str = title) -> None:
                new = Generation.of([step[1:] for step in steps])
                texts[title] = Generation(texts[title].steps + new.steps)
                show(title)

            texts[title] = engine.generate([ids], params, grow).requests[0]
    plain, ppd = texts.values()
    return Comparison(prompt, (plain,), (ppd,))


def near_ties(
    plain: EngineProcess,
    ids: Sequence[Sequence[int]],
    comparisons: Sequence[Comparison],
) -> list[NearTie]:
    """What the model thinks of the two likeliest tokens where texts part."""
    from vllm_ppd.cli.demo_report import NearTie

    found = []
    for number, (prompt, c) in enumerate(zip(ids, comparisons, strict=True)):
        where = c.first_difference
        if where is None:
            continue
        first, second = plain.score([*prompt, *c.plain[0].ids[:where]])
        gap = first[1] - second[1]
        found.append(NearTie(number, where, gap, first[2], second[2]))
    return found


def _short(path: str) -> str:
    """A path as seen from here, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if os.path.exists(path) and len(relative) < len(path) else path


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when both engines ran, whatever the comparison says."""
    from rich.console import Console

    from vllm_ppd.cli.demo_prompts import excerpts
    from vllm_ppd.cli.demo_report import verdict
    from vllm_ppd.cli.demo_view import header, print_plainly, replay, summary
    from vllm_ppd.cli.engines import engine_processes, start_all

    model, prompt_tokens = check(args)
    prompts = args.prompt or excerpts(TEXTS, args.num_prompts)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write what a terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    live = console.is_terminal
    narrator = Narrator(console)
    settings: dict[str, Any] = {
        "model": model,
        "dtype": args.dtype,
        "seed": 0,
        "enforce_eager": args.eager,
        # Each round is to read its prompt, like the first.
        "enable_prefix_caching": False,
    }
    if args.max_model_len:
        settings["max_model_len"] = args.max_model_len
    ppd = {"speculative_config": {"method": "ppd", "model": prompt_tokens}}
    both = {"plain vLLM": settings, "vLLM with PPD": {**settings, **ppd}}
    params = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    console.print(header(_short(model), _short(prompt_tokens), args))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > 0.5:
        console.print(
            f"note: other programs keep this machine busy (load average {load:.1f} per "
            "core), so the speeds below say little",
            style="yellow",
        )

    with engine_processes(both, "demo") as engines:
        pair = list(engines.values())
        with narrator.busy("importing vLLM") as say:
            start_all(pair, say, parallel=True)
            ids = pair[0].encode(prompts)
            say("warming up")
            warm_ups = [engine.generate([ids[0]], params) for engine in pair]
        for note in pair[1].card["notes"]:
            console.print(f"note: {note}", style="yellow")

        slow = warm_ups[0].wall_s > WATCHABLE_S
        comparisons = []
        if slow and live:
            for prompt, tokens in zip(prompts, ids, strict=True):
                comparisons.append(watch(console, pair, prompt, tokens, params))
                replay(console, comparisons[-1], moving=False)
        else:
            rounds = 1 if slow else args.rounds
            with narrator.busy("measuring, each engine in turn"):
                comparisons = measure(pair, prompts, ids, params, rounds)
            for number, comparison in enumerate(comparisons, start=1):
                if live:
                    replay(console, comparison, moving=True)
                else:
                    print_plainly(console, number, len(comparisons), comparison)

        greedy = args.temperature == 0
        ties = near_ties(pair[0], ids, comparisons) if greedy else []
        dtype = pair[0].card["dtype"]
        console.print()
        console.print(summary(comparisons, greedy))
        for line in verdict(comparisons, ties, dtype, args.temperature):
            console.print(line, markup=False)
    return 0
