"""What a token of context costs on this machine: the same steps, short and long."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import numpy as np

from vllm_ppd.adaptive.context_cost import ContextCost, ContextSample
from vllm_ppd.engine.measure import CONTEXT, Visit, agreed

__all__ = ["measure_context_cost"]

# Loads and rows at which contexts are compared.
_REQUESTS, _ROWS = (1, 8), (1, 4, 16)
# The long context, and the least one that says anything.
_LONG, _LEAST = 4096, 4 * CONTEXT
# Rounds of visits, and seconds after which there are no more.
_VISITS, _LONG_ENOUGH = 3, 5.0


class LongVisit(Visit, Protocol):
    """Such requests with a context of their own."""

    context: int
    """Their tokens; fewer than were asked for where the model allows no more."""


def measure_context_cost(
    visit_of: Callable[[int, list[int], int], LongVisit],
    rows: list[int],
    max_requests: int,
) -> ContextCost | None:
    """The cost of context; None where contexts are too short to matter.

    Args:
        visit_of: makes requests, given how many, all row counts to be asked for, and
            the context.
        rows: per request, rising from 1, that a step may have.
        max_requests: most that run at once.
    """
    counts = [count for count in rows if count in _ROWS]
    long = visit_of(1, counts, _LONG).context
    if long < _LEAST or len(counts) < 2:
        return None
    loads = [requests for requests in _REQUESTS if requests <= max_requests]
    found: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    begun = time.perf_counter()
    for _ in range(_VISITS):
        for requests in loads:
            # Short and long ones next to each other: what counts is the difference.
            for context in (CONTEXT, long):
                visit = visit_of(requests, counts, context)
                try:
                    for count in counts:
                        found[requests, count, context] += visit.seconds(count)
                finally:
                    visit.close()
        if agreed(time.perf_counter() - begun > _LONG_ENOUGH):
            break
    more = long - CONTEXT
    return ContextCost.fitted(
        CONTEXT,
        [
            ContextSample(
                requests,
                count,
                float(
                    np.median(found[requests, count, long])
                    - np.median(found[requests, count, CONTEXT])
                )
                / more,
            )
            for requests in loads
            for count in counts
        ],
    )
