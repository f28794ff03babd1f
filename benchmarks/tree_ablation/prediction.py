"""Tokens per step that statistics foretell, for the demo model and the paper's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.environment import ROOT
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.defaults import DEFAULT_ROWS, evidence_of
from vllm_ppd.search.plan_search import best_plan
from vllm_ppd.search.latency import LatencyProfile, default_profile

from .kinds import Trees, Variant, trees_of, value_of

__all__ = ["DEMO", "chosen_sizes", "predict", "predict_published", "published"]

DEMO = "demo"
# Random trees are drawn so often; the first draw is the one that is measured.
_SEEDS = 5


def published() -> dict[str, AcceptanceStats]:
    """The paper's tables by model."""
    folder = ROOT / "benchmarks" / "data"
    files = sorted(folder.glob("*.json"))
    return {file.stem: AcceptanceStats.load(file) for file in files}


def predict(
    variants: Iterable[Variant],
    folder: Path,
    num_prompt_tokens: int,
    num_ept: int,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[Variant, Trees]]:
    """A cell per variant, from the folder's own statistics, and the trees."""
    cells, trees = [], {}
    for variant in variants:
        say(f"trees: {variant.kind}, {variant.rows} rows")
        acceptance = evidence_of(
            folder, num_prompt_tokens, variant.bigram, variant.ngram
        )
        cell, trees[variant] = _cell(DEMO, variant, acceptance, num_ept)
        cells.append(cell)
    return cells, trees


def predict_published(
    variants: Iterable[Variant], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The same for the paper's tables, which know of prompt rows alone.

    Only variants with neither table nor matches are looked at.
    """
    bare = [v for v in variants if not v.bigram and not v.ngram]
    cells = []
    for name, stats in published().items():
        for variant in bare:
            say(f"trees: {name}, {variant.kind}, {variant.rows} rows")
            cells.append(_cell(name, variant, AcceptanceModel.of(stats), 1)[0])
    return cells


def _cell(
    statistics: str, variant: Variant, acceptance: AcceptanceModel, num_ept: int
) -> tuple[dict[str, Any], Trees]:
    seeds = _SEEDS if variant.kind == "random" else 1
    drawn = [
        trees_of(variant.kind, acceptance, variant.rows, num_ept, seed)
        for seed in range(seeds)
    ]
    values = [value_of(trees, acceptance) for trees in drawn]
    cell = {
        "statistics": statistics,
        **variant.to_dict(),
        "tau": round(mean(value.tau for value in values), 4),
        "tau_of_measured": round(values[0].tau, 4),
        "mean_rows": round(mean(value.mean_rows for value in values), 2),
    }
    return cell, drawn[0]


def chosen_sizes(
    folder: Path,
    num_prompt_tokens: int,
    num_ept: int,
    profiles: dict[str, LatencyProfile],
    sources: Iterable[tuple[bool, bool]],
    max_requests: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Our trees at the size that each machine chooses, load by load."""
    machines = {f"typical {device}": default_profile(device) for device in DEFAULT_ROWS}
    cells = []
    for machine, profile in {**machines, **profiles}.items():
        rows = DEFAULT_ROWS["cuda" if machine == "typical cuda" else "cpu"]
        for bigram, ngram in sources:
            say(f"sizes: {machine}")
            acceptance = evidence_of(folder, num_prompt_tokens, bigram, ngram)
            _, tiers = best_plan(acceptance, profile, rows, num_ept, max_requests)
            for tier in tiers:
                on = tier.speculates
                cells.append(
                    {
                        "machine": machine,
                        "bigram": bigram,
                        "ngram": ngram,
                        "requests": tier.requests,
                        "tau": round(tier.found.tau, 4) if on else 1.0,
                        "mean_rows": round(tier.found.mean_rows, 2) if on else 1.0,
                        "gain": round(tier.gain, 4) if on else 1.0,
                    }
                )
    return cells
