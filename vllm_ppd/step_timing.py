"""A latency profile set right by the steps that a serving engine really takes.

A profile is measured in the worker alone, once. Steps of a serving engine take longer,
for scheduling and messages, and the machine is not always equally fast. Where both
kinds of steps have been timed next to each other, with guesses and without, two numbers
per load make up for that: how much longer a plain step takes, and how much more rows
cost, relative to it. The second is the difference of two times that swing, so at first
the profile is believed in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vllm_ppd.latency import LatencyCurve
from vllm_ppd.profile import LatencyProfile

__all__ = ["RowShares", "StepTiming", "corrected"]

# A factor further from 1 than this is taken for noise.
_MOST = 4.0
# Rows that cost less than this share of a plain step say nothing about a factor.
_LEAST_COST = 0.01
# Looks that count as much as the profile does.
_DOUBT = 2

# (rows per request, share of the steps that had them) of some steps.
RowShares = tuple[tuple[float, float], ...]


class StepTiming(NamedTuple):
    """Mean steps of one load, with guesses and without, in one look at both.

    Attributes:
        requests: running; the same number in all looks at a load.
        rows: of the steps with guesses. Not their mean alone: the first rows cost more
            than later ones, so steps of different size take less time than as many of
            the size between.
        plain_s, guessing_s: seconds of a step without guesses and with them.
        context: mean tokens of the requests.
    """

    requests: int
    rows: RowShares
    plain_s: float
    guessing_s: float
    context: int = 1


def corrected(profile: LatencyProfile, timings: Sequence[StepTiming]) -> LatencyProfile:
    """`profile` as the timings have it; loads between them follow the nearest one."""
    if not timings:
        return profile
    loads: dict[int, list[StepTiming]] = {}
    for timing in timings:
        loads.setdefault(timing.requests, []).append(timing)
    factors = {requests: _factors(profile, looks) for requests, looks in loads.items()}
    table, bare = np.array(profile.seconds), np.array(profile.bare)
    for index, requests in enumerate(profile.requests):
        nearest = min(factors, key=lambda n: abs(np.log2(n) - np.log2(requests)))
        slower, cost = factors[nearest]
        first = table[index, 0]
        table[index] = slower * (first + cost * (table[index] - first))
        if bare.size:
            bare[index] = slower * (first + cost * (bare[index] - first))
    found = LatencyProfile.smoothed(
        profile.requests,
        profile.rows,
        table,
        dict(profile.key),
        bare if bare.size else None,
    )
    return replace(found, context_cost=profile.context_cost)


def _factors(
    profile: LatencyProfile, looks: Sequence[StepTiming]
) -> tuple[float, float]:
    """How much longer plain steps of one load take than the profile says, and how much
    more rows cost, in plain steps. Each in the median over looks: within one the
    machine is about equally fast."""
    slower, costs = [], []
    for look in looks:
        curve = profile.at_context(look.context).curve(look.requests)
        plain, beyond = curve.plain_s, _beyond(curve, look.rows)
        slower.append(look.plain_s / plain)
        if beyond > _LEAST_COST * plain:
            extra = look.guessing_s - look.plain_s
            costs.append(extra / look.plain_s * plain / beyond)
    cost = 1.0
    if costs:
        seen = float(np.clip(np.median(costs), 1 / _MOST, _MOST))
        cost = seen ** (len(costs) / (len(costs) + _DOUBT))
    return float(np.clip(np.median(slower), 1 / _MOST, _MOST)), cost


def _beyond(curve: LatencyCurve, rows: RowShares) -> float:
    """Seconds that such steps take longer than plain ones."""
    counts, shares = np.array(rows, dtype=np.float64).T
    return float(shares @ (curve(counts) - curve.plain_s))
