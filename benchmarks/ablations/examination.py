"""How good trained prompt tokens are: accuracy, acceptance, acceptance length."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_ppd.calibrate.measure import Measurement, measure
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_search import SearchResult, optimal_policy
from vllm_ppd.train.evaluation import evaluate
from vllm_ppd.train.settings import TrainSettings

from .walk import walk_text
from .workbench import Workbench

__all__ = ["Examination", "texts_of"]

_WIDE = 10
_CONSTANT = LatencyCurve.constant()


@dataclass(frozen=True)
class Examination:
    """The same for all runs, so that they can be compared."""

    rows: tuple[int, ...] = (8, 16, 64)
    """Rows per step that the best trees may have, each taken to cost as much."""
    prompts: int = 64
    """Held-out texts that the model continues."""
    prompt_length: int = 64
    continuation: int = 96
    temperature: float = 0.0
    """Of the continuations."""
    ranks: int = 32
    sequences: int = 24
    """Windows of held-out text, for accuracy on text that others wrote."""
    length: int = 256
    points: int = 32
    """Insertion points per window, whatever the run trained with."""

    def settings(self, num_prompt_tokens: int) -> CalibrationSettings:
        """Every place of every continuation, so that decoding can be followed."""
        places = self.continuation - num_prompt_tokens - 1
        return CalibrationSettings(
            points=self.prompts * places,
            points_per_prompt=places,
            temperature=self.temperature,
            ranks=self.ranks,
            prompt_length=self.prompt_length,
            continuation=self.continuation,
            batch_size=min(self.prompts, 64),
        )

    def of(self, bench: Workbench, table: torch.Tensor) -> dict[str, Any]:
        """Figures of prompt `table` [m, e, hidden], as JSON.

        Raises ValueError subclasses when the held-out text is too short.
        """
        begun = time.monotonic()
        m, e, _ = table.shape
        found = measure(bench.model, table, bench.held_out, self.settings(m))
        return {
            "held_out": self._on_text(bench, table),
            "acceptance": acceptance_figures(found, self.ranks),
            "rows": self._by_rows(found, e),
            "seconds": round(time.monotonic() - begun, 2),
        }

    def _on_text(self, bench: Workbench, table: torch.Tensor) -> dict[str, list[float]]:
        m, e, _ = table.shape
        settings = TrainSettings(
            steps=1,
            num_prompt_tokens=m,
            num_ept=e,
            length=self.length,
            points=self.points,
        )
        scores = evaluate(
            bench.model,
            table.to(bench.model.device),
            bench.held_out,
            settings,
            self.sequences,
        )
        return {
            name: [round(value, 4) for value in values]
            for name, values in scores.summary().items()
        }

    def _by_rows(self, found: Measurement, num_ept: int) -> dict[str, Any]:
        """Per row count: the best trees' tau, by the model of tree search and walked.

        Rows of ensemble members count like all others.
        """
        figures = {}
        for rows in self.rows:
            best = self._best(found, rows, num_ept)
            figures[str(rows)] = {
                "tau": round(best.tau, 4),
                "walked_tau": round(self._walked(found, rows, num_ept), 4),
                "mean_rows": round(best.mean_rows, 2),
            }
        return figures

    def _walked(self, found: Measurement, rows: int, num_ept: int) -> float:
        """Tokens per step of trees on texts that they were not found from.

        Half of the texts give the trees for the other half, and the other way round.
        """
        tokens = steps = 0
        for half in (0, 1):
            mine = found.prompt % 2 == half
            trees = self._best(part_of(found, ~mine), rows, num_ept).trees
            for ranks in texts_of(part_of(found, mine)):
                counts = walk_text(trees, ranks)
                tokens, steps = tokens + counts[0], steps + counts[1]
        if not steps:
            raise ValueError(
                "the model ends all its continuations at once; use other held-out text"
            )
        return tokens / steps

    def _best(self, found: Measurement, rows: int, num_ept: int) -> SearchResult:
        stats = AcceptanceStats(found.acceptance(self.ranks))
        return optimal_policy(stats, _CONSTANT, rows, num_ept)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def acceptance_figures(found: Measurement, ranks: int) -> dict[str, Any]:
    """Per distance: the rate of the best candidate, and of the ten best."""
    table = found.acceptance(ranks)
    return {
        "points": found.num_points,
        "prompts": found.num_prompts,
        "top1": [round(float(row[0]), 4) for row in table],
        "top1_half_width_95": [round(width, 4) for width in found.half_widths()],
        "top10": [round(float(row[:_WIDE].sum()), 4) for row in table],
        "table": [[round(float(rate), 5) for rate in row] for row in table],
    }


def part_of(found: Measurement, some: torch.Tensor) -> Measurement:
    """The points where `some`, bool [N], holds; the reliability stays that of all.

    Raises ValueError when there are none.
    """
    if not bool(some.any()):
        raise ValueError(
            f"the model continues {found.num_prompts} held-out text(s) only; expected "
            "at least two: use more held-out text"
        )
    return replace(found, ranks=found.ranks[some], prompt=found.prompt[some])


def texts_of(found: Measurement) -> list[Any]:
    """int64 [n, m] per continuation: ranks at its places, which must be all of them."""
    return [found.ranks[found.prompt == i].numpy() for i in found.prompt.unique()]
