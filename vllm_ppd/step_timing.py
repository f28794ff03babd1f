"""A latency profile set right by the steps that a serving engine really takes.

A profile is measured in the worker alone, once. Steps of a serving engine take longer,
for scheduling and messages, and the machine is not always equally fast. Where both
kinds of steps have been timed next to each other, with guesses and without, two numbers
per load make up for that: how long a plain step takes, and what rows cost beyond it.
The second is the difference of two times that swing, so at first the profile is
believed in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vllm_ppd.profile import LatencyProfile

__all__ = ["StepTiming", "corrected"]

# A factor further from 1 than this is taken for noise.
_MOST = 4.0
# Rows that cost less than this share of a plain step say nothing about a factor.
_LEAST_COST = 0.01
# Looks that count as much as the profile does.
_DOUBT = 2


class StepTiming(NamedTuple):
    """Mean steps of one load, close in time.

    Attributes:
        requests: running.
        rows: rows per request of the steps with guesses.
        plain_s, guessing_s: seconds of a step without guesses and with them.
        looks: how often both were looked at.
        context: mean tokens of the requests.
        bare: share of the steps with guesses in which there were none to make.
    """

    requests: int
    rows: float
    plain_s: float
    guessing_s: float
    looks: int
    context: int = 1
    bare: float = 0.0


def corrected(profile: LatencyProfile, timings: Sequence[StepTiming]) -> LatencyProfile:
    """`profile` as the timings have it; loads between them follow the nearest one."""
    if not timings:
        return profile
    table = np.array(profile.seconds)
    for index, requests in enumerate(profile.requests):
        timing = min(
            timings, key=lambda t: abs(np.log2(t.requests) - np.log2(requests))
        )
        curve = profile.at_context(timing.context).curve(timing.requests)
        plain = float(curve.seconds[0])
        # The first rows beyond one cost most, so bare steps are told apart.
        others = 1 - timing.bare
        rows = (timing.rows - timing.bare) / others if others else 1.0
        beyond = others * (curve(max(1.0, rows)) - plain)
        cost, extra = 1.0, timing.guessing_s - timing.plain_s
        if beyond > _LEAST_COST * plain:
            seen = float(np.clip(extra / beyond, 1 / _MOST, _MOST))
            cost = seen ** (timing.looks / (timing.looks + _DOUBT))
        first = table[index, 0] * np.clip(timing.plain_s / plain, 1 / _MOST, _MOST)
        table[index] = first + cost * (table[index] - table[index, 0])
    found = LatencyProfile.smoothed(
        profile.requests, profile.rows, table, dict(profile.key)
    )
    return replace(found, context_cost=profile.context_cost)
