"""The plan for a machine: the best policy at each load, or none where none pays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ppd.evidence import Evidence
from vllm_ppd.evidence_search import EvidencePolicy, best_policy
from vllm_ppd.latency import LatencyCurve
from vllm_ppd.plan import Tier, TreePlan
from vllm_ppd.profile import LatencyProfile
from vllm_ppd.tree import TreePolicy

__all__ = [
    "PlannedTier",
    "best_plan",
    "joined_tiers",
    "least_gain",
    "shared_curve",
    "tier_limits",
]

# Running requests up to which tiers are told apart; half-open powers of two.
_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128)
# What a tier must promise to speculate at all. Predictions for one request err by a few
# per cent; those for requests that share their steps were up to a quarter too high, so
# where nobody measures whether they come true, they have to promise more.
_LEAST_GAIN, _LEAST_GAIN_UNMEASURED = 1.05, 1.3
# Repetitions of a tier's search, and when the mean rows have settled.
_ROUNDS, _CLOSE = 6, 0.1


@dataclass(frozen=True)
class PlannedTier:
    """One tier and what the search expects of it.

    Attributes:
        requests: the load it was searched for, the tier's limit.
        found: the best policy.
        gain: tokens per second relative to plain decoding at that load.
        least_gain: for which the tier speculates.
    """

    requests: int
    found: EvidencePolicy
    gain: float
    least_gain: float = _LEAST_GAIN

    @property
    def speculates(self) -> bool:
        return self.gain >= self.least_gain


def best_plan(
    evidence: Evidence,
    profile: LatencyProfile,
    max_rows: int,
    num_ept: int = 1,
    max_requests: int = _LIMITS[-1],
    measured: bool = True,
    current: TreePlan | None = None,
    loads: Collection[int] = (),
) -> tuple[TreePlan, list[PlannedTier]]:
    """Search every tier of load, or only those in use.

    Args:
        evidence: chances of the candidates.
        profile: seconds of a step by load and rows.
        max_rows: most rows per request and step, root included.
        num_ept: rows per prompt token.
        max_requests: the server's own limit; no tiers beyond it.
        measured: whether a `LoadGuard` will give up tiers that do not pay.
        current: a plan whose tiers stay, but for those of `loads`.
        loads: running requests whose tiers are searched; all without `current`.

    Returns:
        the plan, whose last tier serves every larger load, and per tier that was
        searched (equal ones not merged) what was expected.
    """
    limits = tier_limits(max_requests)
    wanted = limits
    if current is not None:
        wanted = [limit for limit in limits if any(_between(limit, n) for n in loads)]
    planned: list[PlannedTier] = []
    found: EvidencePolicy | None = None
    for requests in wanted:
        found = _best_together(
            evidence, profile.curve(requests), requests, max_rows, num_ept, found
        )
        plain = 1 / float(profile.curve(requests).seconds[0])
        gain = found.tokens_per_second / plain
        least = least_gain(requests, measured)
        planned.append(PlannedTier(requests, found, gain, least))
        # What does not pay at some load does not pay at a higher one.
        if not planned[-1].speculates:
            break
    return joined_tiers(limits, planned, current), planned


def tier_limits(max_requests: int) -> list[int]:
    """Loads up to which tiers are told apart on a server with its own limit."""
    limits = [limit for limit in _LIMITS if limit < max_requests]
    return [*limits, _LIMITS[len(limits)]] if len(limits) < len(_LIMITS) else limits


def least_gain(requests: int, measured: bool) -> float:
    """What a tier must promise, relative to plain decoding, to speculate."""
    return _LEAST_GAIN if requests == 1 or measured else _LEAST_GAIN_UNMEASURED


def _between(limit: int, load: int) -> bool:
    """Whether the tier of `limit` is that of `load`."""
    return limit // 2 < load <= limit or load > limit == _LIMITS[-1]


def joined_tiers(
    limits: Sequence[int], planned: Sequence[PlannedTier], current: TreePlan | None
) -> TreePlan:
    """The tiers that were searched, the others as they were, equal neighbours merged.

    Others follow from what was found where they contradict it: no guesses above a load
    at which they do not pay, some below one at which they do.
    """
    policies: dict[int, tuple[TreePolicy, ...]] = {}
    for limit in limits:
        if current is not None:
            policies[limit] = current.tiers[current.tier_index(limit)].policies
    for each in planned:
        policies[each.requests] = each.found.tier(None).policies
        if not each.speculates:
            policies.update((limit, ()) for limit in limits if limit >= each.requests)
    after: tuple[TreePolicy, ...] = ()
    searched = {each.requests for each in planned}
    for limit in reversed(limits):
        if limit in searched:
            after = policies[limit]
        policies[limit] = policies.get(limit, ()) or after
    tiers: list[Tier] = []
    for limit in limits:
        if tiers and tiers[-1].policies == policies[limit]:
            tiers.pop()
        tiers.append(Tier(None if limit == limits[-1] else limit, policies[limit]))
    return TreePlan(tuple(tiers))


def _best_together(
    evidence: Evidence,
    curve: LatencyCurve,
    requests: int,
    max_rows: int,
    num_ept: int,
    start: EvidencePolicy | None,
) -> EvidencePolicy:
    """The best policy for requests that share their steps.

    What a step costs because there are guesses at all is paid by everyone in it, also
    by a request whose own tree is bare, and rows cost what the rows of all together
    do. How often the others speculate, and with how many rows, is found by repetition.
    """
    if requests == 1:
        return best_policy(evidence, curve, max_rows, num_ept, start=start)
    share, mean_rows = 1.0, 2.0
    for _ in range(_ROUNDS):
        paid = 1 - (1 - share) ** (requests - 1)
        together = shared_curve(curve, paid, mean_rows)
        start = best_policy(evidence, together, max_rows, num_ept, start=start)
        bare = np.array([[t.num_rows == 1 for t in row] for row in start.trees])
        before, mean_rows = mean_rows, start.mean_rows
        share = 1 - float((start.state_distribution * bare).sum())
        if abs(mean_rows - before) < _CLOSE:
            break
    assert start is not None
    return start


def shared_curve(curve: LatencyCurve, paid: float, mean_rows: float) -> LatencyCurve:
    """What the rows of one request cost in a step that it shares.

    Args:
        curve: seconds of a step by rows per request, all requests having as many.
        paid: chance that other requests' guesses are in the step. Then a row alone
            costs what the line through the next two points says, not a plain step.
        mean_rows: rows per request in the mean, at which the cost is right; around it
            every row costs the same, whoever's it is.
    """
    if len(curve.rows) < 3:
        return curve
    (one, two, more), (plain, second, third) = curve.rows[:3], curve.seconds[:3]
    line = second - (third - second) / (more - two) * (two - one)
    first = plain + paid * max(0.0, line - plain)
    mean_rows = max(mean_rows, 1.5)
    beyond = max(0.0, curve(mean_rows) - first)
    return LatencyCurve.linear(first, beyond / (mean_rows - 1))
