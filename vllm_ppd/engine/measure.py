"""Which loads and row counts a machine is measured at, and in which order."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm
from vllm.distributed import get_tp_group

from vllm_ppd.search.latency import LatencyProfile

__all__ = ["CONTEXT", "ROWS", "TIMED", "UNTIMED", "Visit", "agreed", "measure_grid"]

_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A step with more rows in all is far past where speculation pays.
_MOST_ROWS = 512
CONTEXT = 128
# A machine's speed drifts and plans are made of ratios, so all row counts of a load are
# visited in turn, several times, and each visit is short. The first step of a visit has
# no guesses yet, the second warms up.
_VISITS, UNTIMED, TIMED = 3, 2, 3
# What stands for steps of one row that are no plain ones.
_BARE = 0
# Seconds after which there are no more rounds of visits.
_LONG_ENOUGH = 15.0


class Visit(Protocol):
    """So many requests that can be decoded with different rows each."""

    def seconds(self, count: int) -> list[float]:
        """Seconds of each timed step with `count` rows per request."""

    def close(self) -> None:
        """Free the requests."""


AnyVisit = TypeVar("AnyVisit", bound=Visit)


def measure_grid(
    visit_of: Callable[[int, list[int]], AnyVisit],
    rows: list[int],
    limits: Any,
    key: dict[str, Any],
    quiet: bool,
    bare: Callable[[AnyVisit], list[float]] | None = None,
) -> LatencyProfile:
    """The profile for these row counts and all loads that the scheduler allows.

    Args:
        visit_of: makes requests, given how many and all row counts to be asked for.
        rows: per request, rising from 1.
        limits: vLLM's SchedulerConfig.
        key, quiet: of `measure_profile`.
        bare: seconds of each step in which nobody guesses, though guesses may come;
            None where those are plain steps.
    """
    most = min(_MOST_ROWS, limits.max_num_batched_tokens)
    loads = {
        requests: [n for n in rows if n == 1 or requests * n <= most]
        for requests in _REQUESTS
        if requests <= limits.max_num_seqs
    }
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    cells = sum(len(counts) + (bare is not None) for counts in loads.values())
    begun = time.perf_counter()
    with tqdm(
        total=_VISITS * cells, desc="PPD measures steps", unit="", disable=quiet
    ) as bar:
        for _ in range(_VISITS):
            for requests, counts in loads.items():
                visit = visit_of(requests, counts)
                try:
                    for count in counts:
                        found[requests, count] += visit.seconds(count)
                        bar.update()
                        if bare is not None and count == 1:
                            found[requests, _BARE] += bare(visit)
                            bar.update()
                finally:
                    visit.close()
            if agreed(time.perf_counter() - begun > _LONG_ENOUGH):
                break
        bar.total = bar.n
    medians = {cell: float(np.median(times)) for cell, times in found.items()}
    table = np.array([_fill_row(medians, load, rows) for load in loads])
    others = None
    if bare is not None:
        others = np.array([medians[load, _BARE] for load in loads])
    return LatencyProfile.smoothed(list(loads), rows, table, key, others)


def agreed(answer: bool) -> bool:
    """Rank 0's answer: all ranks run the same steps, or they wait for each other."""
    group = get_tp_group()
    return answer if group.world_size == 1 else group.broadcast_object(answer, src=0)


def _fill_row(
    found: dict[tuple[int, int], float], load: int, rows: list[int]
) -> list[float]:
    """Seconds by rows; beyond what was measured, in proportion to the rows."""
    seconds: list[float] = []
    for index, count in enumerate(rows):
        if (load, count) in found:
            seconds.append(found[load, count])
        else:
            seconds.append(seconds[-1] * count / rows[index - 1])
    return seconds
