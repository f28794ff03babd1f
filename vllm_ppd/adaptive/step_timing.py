"""A latency profile set right by the steps that a serving engine really takes.

A profile is measured in the worker alone, once. Steps of a serving engine take longer,
for scheduling and messages, and the machine is not always equally fast. Where both
kinds of steps have been timed next to each other, with guesses and without, three
numbers per load make up for that: how much longer a plain step takes, how much more
rows cost, relative to it, and what it costs to look for guesses and find none. The last
two are differences of times that swing, so at first the profile is believed in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import mul
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.latency import LatencyProfile

__all__ = ["RowSteps", "StepTiming", "corrected", "mean_rows"]

# A factor further from 1 than this is taken for noise.
_MOST = 4.0
# Fewer steps of a kind say nothing of it, nor rows that cost less than this share of a
# plain step.
_LEAST_STEPS, _LEAST_COST = 6, 0.01
# Looks that count as much as the profile does.
_DOUBT = 2

# (rows per request, number of steps that had them).
RowSteps = tuple[tuple[float, int], ...]


def mean_rows(row_steps: RowSteps) -> float:
    """Rows per request of the mean step."""
    rows, steps = zip(*row_steps, strict=True)
    return sum(map(mul, rows, steps)) / sum(steps)


class StepTiming(NamedTuple):
    """Mean steps of one load, with guesses and without, in one look at both.

    Attributes:
        requests: running; the same number in all looks at a load.
        rows: of the steps while there were guesses. Not their mean alone: the first
            rows cost more than later ones, so steps of many sizes take less time than
            as many of the size between.
        plain_s, guessing_s: seconds of a step without guesses and with them.
        bare_s: of those among the latter that had none, with one row; 0 if all had.
        context: mean tokens of the requests.
    """

    requests: int
    rows: RowSteps
    plain_s: float
    guessing_s: float
    bare_s: float = 0.0
    context: int = 1


class _Factors(NamedTuple):
    """What a load's times are beside the profile's."""

    slower: float
    """A plain step's."""
    bare: float
    """A bare step's, both in plain steps."""
    cost: float
    """Those of rows beyond the first, both in plain steps."""


def corrected(profile: LatencyProfile, timings: Sequence[StepTiming]) -> LatencyProfile:
    """`profile` as the timings have it; loads between them follow the nearest one."""
    if not timings:
        return profile
    loads: dict[int, list[StepTiming]] = {}
    for timing in timings:
        loads.setdefault(timing.requests, []).append(timing)
    factors = {requests: _factors(profile, looks) for requests, looks in loads.items()}
    table = np.array(profile.seconds)
    bare = np.array(profile.bare or table[:, 0])
    for index, requests in enumerate(profile.requests):
        nearest = min(factors, key=lambda n: abs(np.log2(n) - np.log2(requests)))
        found, first = factors[nearest], table[index, 0]
        table[index] = found.slower * (first + found.cost * (table[index] - first))
        bare[index] *= found.slower * found.bare
    found_profile = LatencyProfile.smoothed(
        profile.requests, profile.rows, table, dict(profile.key), bare
    )
    return replace(found_profile, context_cost=profile.context_cost)


def _factors(profile: LatencyProfile, looks: Sequence[StepTiming]) -> _Factors:
    """Each in the median over looks: within one the machine is about equally fast."""
    slower, bare, costs = [], [], []
    # A search is asked for within a decode step, and curves take most of the time.
    curves = {
        look.context: profile.at_context(look.context).curve(look.requests)
        for look in {each.context: each for each in looks}.values()
    }
    for look in looks:
        curve = curves[look.context]
        slower.append(look.plain_s / curve.plain_s)
        steps = dict(look.rows)
        without = steps.pop(1.0, 0)
        if without >= _LEAST_STEPS:
            bare.append(look.bare_s / look.plain_s / (curve(1) / curve.plain_s))
        count = sum(steps.values())
        if count >= _LEAST_STEPS:
            seconds = look.guessing_s * (count + without) - look.bare_s * without
            known = sum(n * curve(rows) for rows, n in steps.items())
            extra = known / (count * curve.plain_s) - 1
            if extra > _LEAST_COST:
                costs.append((seconds / (count * look.plain_s) - 1) / extra)
    return _Factors(_believed(slower, 0), _believed(bare), _believed(costs))


def _believed(seen: Sequence[float], doubt: int = _DOUBT) -> float:
    """A factor on what the profile says, the nearer to 1 the fewer looks it is of."""
    if not seen:
        return 1.0
    factor = float(np.clip(np.median(seen), 1 / _MOST, _MOST))
    return factor ** (len(seen) / (len(seen) + doubt))
