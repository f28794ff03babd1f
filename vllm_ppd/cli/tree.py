"""`vllm-ppd tree`: the trees that a prompt-token folder is served with, and why."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_ppd.search.acceptance import AcceptanceModel
    from vllm_ppd.search.plan_choice import PlanSettings
    from vllm_ppd.search.latency import LatencyProfile
    from vllm_ppd.search.report import LoadFigures
    from vllm_ppd.trees.menu import TreePlan

# Loads at which a plan of the user's own is looked at.
_LOADS = (1, 2, 4, 8, 16, 32, 64, 128)
_LINES = 14
_MOST_REQUESTS = 100_000
# Trees are looked at for all contexts; serving goes as far as the model does.
_MOST_CONTEXT = 1 << 20


def _loads(text: str) -> list[int]:
    """An argparse type: rising numbers of requests."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if not 1 <= found[0] <= found[-1] <= _MOST_REQUESTS:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected numbers of running requests, such as 1,4,16"
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder or hub id of prompt tokens")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="kind of machine to plan for (default: cuda where there is a GPU)",
    )
    parser.add_argument(
        "--profile",
        default="none",
        metavar="FILE",
        help="plan by a measured machine, as vllm-ppd profile writes it; none is a "
        "typical one (default)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="most rows per request and step, root included (default: what serving "
        "allows on the device, 16 or 64)",
    )
    parser.add_argument(
        "--requests",
        type=_loads,
        metavar="N,..",
        help="running requests to show figures and trees for (default: figures of "
        "every tier, trees of the first)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1,
        metavar="N",
        help="mean tokens of a running request, where the profile knows what contexts "
        "cost (default: short ones)",
    )
    parser.add_argument(
        "--no-ngram", action="store_true", help="do not look for earlier matches"
    )
    parser.add_argument(
        "--no-bigram",
        action="store_true",
        help="do not use the bigram table",
    )
    parser.add_argument(
        "--tree", metavar="FILE", help="look at this policy or plan instead of the best"
    )
    parser.add_argument(
        "--lines",
        type=int,
        default=_LINES,
        metavar="N",
        help=f"most lines per tree (default {_LINES}); 0 draws everything",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw it: .png, .svg, .pdf")
    parser.add_argument(
        "--save",
        metavar="FILE",
        help='write the plan as JSON, for "tree" in speculative_config',
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what --plot or --save names"
    )


def _check(args: argparse.Namespace) -> None:
    from vllm_ppd.cli.output_files import check_plot, check_target
    from vllm_ppd.trees.tree import MAX_ROWS

    if args.rows is not None and not 2 <= args.rows <= MAX_ROWS:
        raise ValueError(
            f"--rows is {args.rows}; expected 2 to {MAX_ROWS}, the root and the "
            "guesses (one row alone is plain decoding)"
        )
    if args.context < 1:
        raise ValueError(f"--context is {args.context}; expected 1 or more tokens")
    if args.lines < 0:
        raise ValueError(f"--lines is {args.lines}; expected 0 or more")
    check_plot(args.plot, args.overwrite)
    check_target("--save", args.save, args.overwrite)


def plan_settings(args: argparse.Namespace, folder: Path) -> PlanSettings:
    """As the engine would make them for these flags."""
    import torch

    from vllm_ppd.prompt_tokens.tokens import PromptTokens
    from vllm_ppd.search.defaults import row_limit
    from vllm_ppd.search.plan_choice import PlanSettings
    from vllm_ppd.trees.bigram import BIGRAM_FILE
    from vllm_ppd.trees.tree import MAX_ROWS

    prompts = PromptTokens.load(folder)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    extra = None if args.rows is None else args.rows - 1
    rows = row_limit(device, prompts.num_ept, extra)
    if args.tree is not None and args.rows is None:
        rows = MAX_ROWS
    return PlanSettings(
        path=str(folder),
        num_prompt_tokens=prompts.num_prompt_tokens,
        num_ept=prompts.num_ept,
        device=device,
        max_rows=rows,
        max_requests=_LOADS[-1],
        max_context=_MOST_CONTEXT,
        tree=args.tree,
        bigram=not args.no_bigram and (folder / BIGRAM_FILE).exists(),
        ngram=not args.no_ngram,
        # vLLM's V2 runner, which serves on GPUs, does not compare speeds, and gives all
        # requests as many rows.
        measured=device == "cpu",
        fixed_rows=device == "cuda",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 0. Raises ValueError subclasses for unusable input."""
    from vllm_ppd.cli.output_files import write_plot
    from vllm_ppd.files import write_json
    from vllm_ppd.hub import resolve_path
    from vllm_ppd.search.defaults import evidence_of
    from vllm_ppd.search.latency import LatencyProfile, default_profile
    from vllm_ppd.search.report import evidence_for, load_figures
    from vllm_ppd.search.tree_plot import draw_plan

    _check(args)
    folder = resolve_path(args.path)
    settings = plan_settings(args, folder)
    profile = None if args.profile == "none" else LatencyProfile.load(args.profile)
    plan, planned = settings.choose(profile)
    # A plan of the user's own says by itself whether matches are looked for.
    ngram = plan.num_classes > 1
    known = evidence_of(
        folder, settings.num_prompt_tokens, settings.bigram, ngram
    )
    acceptance = evidence_for(plan, known)
    used = profile or default_profile(settings.device)
    # What requests of that context see of it.
    here, first = plan.at_context(args.context), plan.tier_index(1, args.context)
    searched = [p.requests for p in planned if plan.tier_index(1, p.context) == first]
    used = used.at_context(args.context)
    loads = args.requests or searched or list(_LOADS)
    figures = [
        load_figures(here, acceptance, used, load, settings.fixed_rows)
        for load in loads
    ]
    shown = _tiers_to_show(figures, bool(args.requests))
    _print(args, settings, here, acceptance, profile, figures, shown)
    if args.save:
        write_json(Path(args.save).expanduser(), plan.to_dict())
        print(f"The plan is in {args.save}.")
    if args.plot:
        title = f"{folder.name}, {_machine(settings, profile)}"
        chosen = shown[0] if shown else None
        write_plot(
            args.plot,
            lambda kind: draw_plan(figures, chosen, profile is not None, title, kind),
        )
    return 0


def _tiers_to_show(figures: list[LoadFigures], all_of_them: bool) -> list[LoadFigures]:
    """One load of each tier that speculates; only the first tier unless asked."""
    found: dict[int, LoadFigures] = {}
    for each in figures:
        if each.states:
            found.setdefault(each.tier, each)
    return list(found.values()) if all_of_them else list(found.values())[:1]


def _machine(settings: PlanSettings, profile: LatencyProfile | None) -> str:
    if profile is None:
        return f"a typical {'GPU' if settings.device == 'cuda' else 'CPU'}"
    return str(profile.key.get("device", "the machine of the profile"))


def _sources(
    settings: PlanSettings, plan: TreePlan, acceptance: AcceptanceModel
) -> str:
    """What guesses are made from, and how well that is known."""
    from vllm_ppd.search.acceptance import ACCEPTANCE_FILE
    from vllm_ppd.search.defaults import ACCEPTANCE_FILE

    count, ept = settings.num_prompt_tokens, settings.num_ept
    parts = [f"{count} prompt token{'s' * (count > 1)}"]
    if ept > 1:
        parts[0] += f" of {ept} rows"
    if settings.bigram:
        parts.append("bigram table")
    if plan.num_classes > 1:
        parts.append("earlier matches")
    folder = Path(settings.path)
    known = [n for n in (ACCEPTANCE_FILE, ACCEPTANCE_FILE) if (folder / n).exists()]
    return ", ".join(parts) + (
        f" ({known[0]})" if known else " (typical chances: calibrate for measured ones)"
    )


def _print(
    args: argparse.Namespace,
    settings: PlanSettings,
    plan: TreePlan,
    acceptance: AcceptanceModel,
    profile: LatencyProfile | None,
    figures: list[LoadFigures],
    shown: list[LoadFigures],
) -> None:
    import io

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vllm_ppd.cli.tree_view import loads_table, trees_view

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    utf8 = console.encoding.lower().startswith("utf")
    facts = Table.grid(padding=(0, 2))
    rows = {
        "prompt tokens": args.path,
        "guesses from": _sources(settings, plan, acceptance),
        "machine": _machine(settings, profile)
        + ("" if profile else "; --profile FILE plans by a measured one"),
        "trees": f"{args.tree}"
        if args.tree
        else f"the best of at most {settings.max_rows} rows per request and step",
    }
    for name, value in rows.items():
        facts.add_row(f"[dim]{name}[/]", escape(value))
    console.print(facts, "")
    measured, exact = profile is not None, bool(args.requests)
    console.print(loads_table(figures, plan, measured, exact, utf8))
    if not shown:
        console.print("\nNowhere do guesses pay: every step is a plain one.")
    for each in shown:
        limit = plan.tiers[each.tier].max_requests
        title = (
            "at any load"
            if limit is None
            else f"up to {limit} running request{'s' * (limit != 1)}"
        )
        if limit is None and each.tier:
            before = plan.tiers[each.tier - 1].max_requests
            title = f"more than {before} running requests"
        console.print("")
        lines = args.lines or None
        console.print(trees_view(each, f"trees: {title}", console, lines, utf8))
