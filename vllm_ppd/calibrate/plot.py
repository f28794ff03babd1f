"""The plot beside an acceptance table, drawn from the file's content alone."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from vllm_ppd.search.acceptance_table import AcceptanceStats

__all__ = ["draw"]

# A bin with fewer candidates says nothing yet.
_LEAST_CANDIDATES = 30


def draw(stats: AcceptanceStats) -> bytes:
    """A PNG: cumulative acceptance by rank, and the prompt rows' reliability.

    `stats.source` is as vllm_ppd.calibrate.job writes it. Raises ImportError
    without matplotlib.
    """
    from matplotlib.figure import Figure

    source: Any = stats.source
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks = np.arange(1, stats.num_ranks + 1)
    for distance in range(stats.num_prompt_tokens):
        colour, label = f"C{distance}", f"distance {distance + 1}"
        reached = stats.acceptance[distance].cumsum()
        left.plot(ranks, reached, ".-", color=colour, label=label)
        width = source["top1_half_width_95"][distance]
        left.errorbar(1, reached[0], yerr=width, color=colour, capsize=4)
        bins = source["reliability"][distance]
        predicted, observed = np.array(bins["predicted"]), np.array(bins["observed"])
        # Zero has no place on a logarithmic axis.
        shown = (np.array(bins["count"]) >= _LEAST_CANDIDATES) & (observed > 0)
        right.plot(
            predicted[shown],
            observed[shown],
            ".-",
            color=colour,
            label=label,
        )
    left.set(xlabel="candidates", ylabel="true token among them", ylim=(0, 1))
    right.plot([1e-4, 1], [1e-4, 1], "--", color="grey", label="calibrated")
    right.set(
        xlabel="probability the prompt row gives",
        ylabel="share of candidates that are right",
        xscale="log",
        yscale="log",
        xlim=(1e-4, 1.2),
        ylim=(1e-4, 1.2),
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    how = "greedy" if not source["temperature"] else f"T = {source['temperature']:g}"
    name = source["base_model"]["name"]
    figure.suptitle(f"{name}, {how}, {source['points']} points")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
