"""The plan for a machine: the best policy at each load, or none where none pays.

Long contexts make plain steps longer, and rows dearer or, in comparison, cheaper. Where
the profile says that this matters each range of contexts has tiers of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ppd.adaptive.context_cost import context_bands
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import SearchedPolicy, best_policy, policy_value
from vllm_ppd.search.profile import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import TreePolicy

__all__ = [
    "PlannedTier",
    "best_plan",
    "joined_tiers",
    "least_gain",
    "served_speed",
    "shared_curve",
    "tier_limits",
]

# Running requests up to which tiers are told apart; half-open powers of two.
_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128)
# What a tier must promise to speculate at all. Predictions for one request err by a few
# per cent; those for requests that share their steps were up to a quarter too high, so
# where nobody measures whether they come true, they have to promise more.
_LEAST_GAIN, _LEAST_GAIN_UNMEASURED = 1.05, 1.3
# What a range of contexts must gain by its own trees over those of shorter ones.
_WORTH = 1.03
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
        context: mean tokens of a request that it was searched for.
    """

    requests: int
    found: SearchedPolicy
    gain: float
    least_gain: float = _LEAST_GAIN
    context: int = 1

    @property
    def speculates(self) -> bool:
        return self.gain >= self.least_gain


def best_plan(
    acceptance: AcceptanceModel,
    profile: LatencyProfile,
    max_rows: int,
    num_ept: int = 1,
    max_requests: int = _LIMITS[-1],
    measured: bool = True,
    max_context: int = 1,
    current: TreePlan | None = None,
    loads: Collection[tuple[int, int]] = (),
) -> tuple[TreePlan, list[PlannedTier]]:
    """Search every tier of load, or only those in use.

    Args:
        acceptance: chances of the candidates.
        profile: seconds of a step by load, rows and context.
        max_rows: most rows per request and step, root included.
        num_ept: rows per prompt token.
        max_requests: the server's own limit; no tiers beyond it.
        measured: whether a `LoadGuard` will give up tiers that do not pay.
        max_context: most tokens of a request.
        current: a plan whose tiers stay, but for those of `loads`.
        loads: running requests, and their tokens in the mean, whose tiers are searched;
            all without `current`.

    Returns:
        the plan, whose last tier serves every larger load, and per tier that was
        searched (equal ones not merged) what was expected.
    """
    limits = tier_limits(max_requests)
    plans: list[tuple[int | None, TreePlan]] = []
    planned: list[PlannedTier] = []
    shorter, before = 0, None
    for limit, context in context_bands(profile.context_cost, max_context):
        there = profile.at_context(context)
        now = None if current is None else current.at_context(context)
        # What has trees in common with shorter contexts goes on so unless they differ.
        shared = plans[-1][1] if plans and now == before else None
        if current is None:
            new = shared is None or _differs(there, profile, limits)
            wanted = limits if new else []
        else:
            most = math.inf if limit is None else limit
            used = [n for n, c in loads if shorter < c <= most]
            wanted = [n for n in limits if _of(n, used)]
        search = _Search(acceptance, there, context, max_rows, num_ept, measured)
        found = search.tiers(wanted)
        plan = joined_tiers(limits, found, now) if found else shared or now
        if found and shared is not None and not search.pays(found, shared):
            plan, found = shared, []
        assert plan is not None
        shorter, before = limit or shorter, now
        plans.append((limit, plan))
        planned += found
    return TreePlan.by_context(plans), planned


def _differs(there: LatencyProfile, profile: LatencyProfile, limits: list[int]) -> bool:
    """Whether rows cost, in plain steps, so much more or less in one profile than in
    the other that other trees may be the best."""
    for requests in limits:
        first, second = there.curve(requests), profile.curve(requests)
        ours = np.array(first.seconds) / first.plain_s
        ratio = ours / (np.array(second.seconds) / second.plain_s)
        if max(ratio.max(), 1 / ratio.min()) >= _WORTH:
            return True
    return False


@dataclass(frozen=True)
class _Search:
    """Of the tiers for one range of contexts, whose steps `profile` has."""

    acceptance: AcceptanceModel
    profile: LatencyProfile
    context: int
    max_rows: int
    num_ept: int
    measured: bool

    def tiers(self, limits: list[int]) -> list[PlannedTier]:
        """Up to the first load at which guesses do not pay."""
        planned: list[PlannedTier] = []
        found: SearchedPolicy | None = None
        for requests in limits:
            curve = self.profile.curve(requests)
            found = _best_together(
                self.acceptance, curve, requests, self.max_rows, self.num_ept, found
            )
            gain = found.tokens_per_second * curve.plain_s
            least = least_gain(requests, self.measured)
            planned.append(PlannedTier(requests, found, gain, least, self.context))
            # What does not pay at some load does not pay at a higher one.
            if not planned[-1].speculates:
                break
        return planned

    def pays(self, planned: list[PlannedTier], other: TreePlan) -> bool:
        """Whether some tier is enough faster than that of another plan would be."""
        for each in planned:
            curve = self.profile.curve(each.requests)
            plain = 1 / curve.plain_s
            ours = each.gain * plain if each.speculates else plain
            if ours >= _WORTH * served_speed(other, self.acceptance, curve, each):
                return True
        return False


def served_speed(
    plan: TreePlan, acceptance: AcceptanceModel, curve: LatencyCurve, tier: PlannedTier
) -> float:
    """Tokens per second of one request where `plan` serves the load of `tier`."""
    served = plan.tiers[plan.tier_index(tier.requests, tier.context)].policies
    if not served:
        return 1 / curve.plain_s
    trees = [policy.trees for policy in served]
    _, speed, share = policy_value(trees, acceptance, curve)
    if tier.requests > 1:
        rows = [[tree.num_rows for tree in row] for row in trees]
        mean = float((share * np.array(rows)).sum())
        speed = policy_value(trees, acceptance, shared_curve(curve, 1.0, mean))[1]
    return speed


def tier_limits(max_requests: int) -> list[int]:
    """Loads up to which tiers are told apart on a server with its own limit."""
    limits = [limit for limit in _LIMITS if limit < max_requests]
    return [*limits, _LIMITS[len(limits)]] if len(limits) < len(_LIMITS) else limits


def least_gain(requests: int, measured: bool) -> float:
    """What a tier must promise, relative to plain decoding, to speculate."""
    return _LEAST_GAIN if requests == 1 or measured else _LEAST_GAIN_UNMEASURED


def _of(limit: int, loads: Collection[int]) -> bool:
    """Whether the tier of `limit` is that of one of the loads."""
    return any(
        limit // 2 < load <= limit or load > limit == _LIMITS[-1] for load in loads
    )


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
    acceptance: AcceptanceModel,
    curve: LatencyCurve,
    requests: int,
    max_rows: int,
    num_ept: int,
    start: SearchedPolicy | None,
) -> SearchedPolicy:
    """The best policy for requests that share their steps.

    What a step costs because there are guesses at all is paid by everyone in it, also
    by a request whose own tree is bare, and rows cost what the rows of all together
    do. How often the others speculate, and with how many rows, is found by repetition.
    """
    if requests == 1:
        return best_policy(acceptance, curve, max_rows, num_ept, start=start)
    share, mean_rows = 1.0, 2.0
    for _ in range(_ROUNDS):
        paid = 1 - (1 - share) ** (requests - 1)
        together = shared_curve(curve, paid, mean_rows)
        start = best_policy(acceptance, together, max_rows, num_ept, start=start)
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
            costs what the line through the next two points says, not a bare step.
        mean_rows: rows per request in the mean, at which the cost is right; around it
            every row costs the same, whoever's it is.
    """
    if len(curve.rows) < 3:
        return curve
    (one, two, more), (bare, second, third) = curve.rows[:3], curve.seconds[:3]
    line = second - (third - second) / (more - two) * (two - one)
    first = bare + paid * max(0.0, line - bare)
    mean_rows = max(mean_rows, 1.5)
    beyond = max(0.0, curve(mean_rows) - first)
    return LatencyCurve.linear(first, beyond / (mean_rows - 1))
