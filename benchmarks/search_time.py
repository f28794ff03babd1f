"""How long does it take to find the best trees?

    python benchmarks/search_time.py --dry-run
    python benchmarks/search_time.py --out benchmarks/results/search_time.json

Times three searches by rows, prompt tokens (m) and rows per prompt token (EPT), on
typical chances and a typical GPU's latencies:

- optimal_policy: prompt rows alone, one load (`vllm_ppd/search/tree_search.py`);
- best_policy: with a bigram table and earlier matches, one load
  (`vllm_ppd/search/policy_iteration.py`);
- best_plan: the same for every tier of load, what a start of the server does
  (`vllm_ppd/search/plan_search.py`). A plan serves at most 129 rows.

Each is repeated for a while, slow ones are run once; the median of the processor's time
is shown, which other programs disturb less than the clock. The last line printed is one
JSON document.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from environment import environment_card

from vllm_ppd.files import write_json
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.defaults import typical_acceptance
from vllm_ppd.search.plan_search import best_plan
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.search.latency import default_profile
from vllm_ppd.search.tree_search import optimal_policy
from vllm_ppd.trees.tree import MAX_ROWS

SEARCHES = ("optimal_policy", "best_policy", "best_plan")
# With more, the typical chances would sum to over one.
_RANKS = 16


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[16, 64, 128, 512])
    add("--prompt-tokens", type=int, nargs="+", default=list(range(3, 9)), metavar="M")
    add("--ept", type=int, nargs="+", default=[1, 2], help="rows per prompt token")
    add("--seconds", type=float, default=1.0, help="for repeating each search")
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--dry-run", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.rows, args.prompt_tokens, args.ept = [8], [1], [1]
        args.seconds = 0.0
    for name in ("rows", "prompt_tokens", "ept"):
        if min(getattr(args, name)) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {min(getattr(args, name))}; expected 1 or more")
    return args


def evidence_of(num_prompt_tokens: int) -> AcceptanceModel:
    """Every source at work: prompt rows, a bigram table, earlier matches."""
    stats = typical_acceptance(num_prompt_tokens, _RANKS)
    bare = AcceptanceModel.of(stats)
    alone = 0.6 * stats.acceptance[0]
    overall = np.concatenate([stats.acceptance, alone[None]])
    return replace(bare, unprompted=alone, overall=overall).with_typical_chains()


def searches(rows: int, m: int, ept: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The searches of one size by name."""
    stats, acceptance = typical_acceptance(m, _RANKS), evidence_of(m)
    profile = default_profile("cuda")
    curve = profile.curve(1)
    yield "optimal_policy", lambda: optimal_policy(stats, curve, rows, ept)
    yield "best_policy", lambda: best_policy(acceptance, curve, rows, ept)
    if rows <= MAX_ROWS:
        yield "best_plan", lambda: best_plan(acceptance, profile, rows, ept)


def timed(search: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Run it again and again for `seconds`, once at least."""
    wall: list[float] = []
    cpu: list[float] = []
    begun = time.perf_counter()
    while not wall or time.perf_counter() - begun < seconds:
        clock, used = time.perf_counter(), time.process_time()
        search()
        wall.append(time.perf_counter() - clock)
        cpu.append(time.process_time() - used)
    return {
        "cpu_s": round(median(cpu), 6),
        "wall_s": round(median(wall), 6),
        "fastest_s": round(min(wall), 6),
        "runs": len(wall),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    card = environment_card()
    cells = []
    for rows in args.rows:
        for m in args.prompt_tokens:
            for ept in args.ept:
                for name, search in searches(rows, m, ept):
                    cell = {"search": name, "rows": rows, "m": m, "ept": ept}
                    cells.append({**cell, **timed(search, args.seconds)})
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": "search_time",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {
            **card,
            "python": sys.version.split()[0],
            "numpy": importlib.metadata.version("numpy"),
        },
        "settings": {"seconds": args.seconds, "ranks": _RANKS, "device": "cuda"},
        "cells": cells,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Milliseconds: a row per search, EPT and m, a column per rows."""
    rows = sorted({cell["rows"] for cell in cells})
    lines = [
        "| search | EPT | m | " + " | ".join(f"{n} rows, ms" for n in rows) + " |",
        "|---" * (3 + len(rows)) + "|",
    ]
    sizes = dict.fromkeys((c["search"], c["ept"], c["m"]) for c in cells)
    for name, ept, m in sorted(sizes, key=lambda s: (SEARCHES.index(s[0]), *s[1:])):
        times = {
            cell["rows"]: f"{1000 * cell['cpu_s']:.1f}"
            for cell in cells
            if (cell["search"], cell["ept"], cell["m"]) == (name, ept, m)
        }
        lines.append(
            f"| {name} | {ept} | {m} | "
            + " | ".join(times.get(count, "-") for count in rows)
            + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        results = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results["cells"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
        print(f"written to {args.out}", file=sys.stderr)
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
