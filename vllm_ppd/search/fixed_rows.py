"""Plans for engines that schedule the same rows for every request of a step.

vLLM's V2 runner decides before a step how many rows each request gets, by the load
alone, so that one CUDA graph fits. Rows that a tree has no use for are padding and cost
as much as others. So a tier's step takes as long as its number of rows says, whichever
trees it has: the best trees are those with the most tokens per step within it, and the
best number of rows is that with the most tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.plan_search import (
    PlannedTier,
    joined_tiers,
    least_gain,
    tier_limits,
)
from vllm_ppd.search.policy_iteration import SearchedPolicy, best_policy, policy_value
from vllm_ppd.search.profile import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan

__all__ = ["best_fixed_plan", "best_within", "better_within"]

# Numbers of rows that are tried.
_ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def best_within(
    acceptance: AcceptanceModel, rows: Sequence[int], num_ept: int
) -> dict[int, SearchedPolicy]:
    """For each number of rows the policy with the most tokens per step.

    Its ``tokens_per_second`` are tokens per step: a step counts as one second.
    """
    found: dict[int, SearchedPolicy] = {}
    policy: SearchedPolicy | None = None
    for count in sorted(rows):
        policy = best_policy(
            acceptance, LatencyCurve.constant(), count, num_ept, start=policy
        )
        found[count] = policy
    return found


def best_fixed_plan(
    acceptance: AcceptanceModel,
    profile: LatencyProfile,
    max_rows: int,
    num_ept: int,
    max_requests: int,
    measured: bool,
) -> tuple[TreePlan, list[PlannedTier]]:
    """The best number of rows for each load, and the best trees within it.

    Arguments and result are those of `plan_search.best_plan`.
    """
    rows = {count for count in _ROWS if count < max_rows} | {max_rows}
    policies = best_within(acceptance, sorted(rows), num_ept)
    limits = tier_limits(max_requests)
    planned: list[PlannedTier] = []
    for requests in limits:
        curve = profile.curve(requests)
        speeds = {
            # What is scheduled is what the largest tree needs.
            count: policy.tau / curve(policy.max_rows)
            for count, policy in policies.items()
        }
        best = max(speeds, key=lambda count: speeds[count])
        found = replace(policies[best], tokens_per_second=speeds[best])
        gain = speeds[best] * curve.plain_s
        planned.append(
            PlannedTier(requests, found, gain, least_gain(requests, measured))
        )
        # What does not pay at some load does not pay at a higher one.
        if not planned[-1].speculates:
            break
    return joined_tiers(limits, planned, None), planned


def better_within(
    acceptance: AcceptanceModel,
    current: TreePlan,
    rows: Sequence[int],
    num_ept: int,
    least_gain: float,
) -> TreePlan | None:
    """Trees for new acceptance in as many rows, where they are enough better.

    Args:
        acceptance: what is believed now.
        current: the plan that is served.
        rows: of each of its tiers.
        num_ept: rows per prompt token.
        least_gain: in tokens per step, for which a tier's trees are changed.

    Returns:
        the plan with better trees, None where no tier has any. Tiers that do not
        speculate have no rows to do it with.
    """
    used = {
        count
        for tier, count in zip(current.tiers, rows, strict=True)
        if tier.policies and count > 1
    }
    found = best_within(acceptance, sorted(used), num_ept)
    tiers: list[Tier] = []
    for tier, count in zip(current.tiers, rows, strict=True):
        best = tier
        if tier.policies and count > 1:
            trees = [policy.trees for policy in tier.policies]
            tau, _, _ = policy_value(trees, acceptance, LatencyCurve.constant())
            if found[count].tau >= least_gain * tau:
                best = found[count].tier(tier.max_requests)
        tiers.append(best)
    plan = TreePlan(tuple(tiers))
    return None if plan == current else plan
