"""The plan for a machine: the best policy at each load, or none where none pays."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_ppd.evidence import Evidence
from vllm_ppd.evidence_search import EvidencePolicy, best_policy
from vllm_ppd.plan import Tier, TreePlan
from vllm_ppd.profile import LatencyProfile

__all__ = ["PlannedTier", "best_plan"]

# Running requests up to which tiers are told apart; half-open powers of two.
_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128)
# Predictions err by a few per cent; a smaller gain is not worth the risk of a loss.
_LEAST_GAIN = 1.04


@dataclass(frozen=True)
class PlannedTier:
    """One tier and what the search expects of it.

    Attributes:
        requests: the load it was searched for, the tier's limit.
        found: the best policy.
        gain: tokens per second relative to plain decoding at that load.
    """

    requests: int
    found: EvidencePolicy
    gain: float

    @property
    def speculates(self) -> bool:
        return self.gain >= _LEAST_GAIN


def best_plan(
    evidence: Evidence,
    profile: LatencyProfile,
    max_rows: int,
    num_ept: int = 1,
    max_requests: int = _LIMITS[-1],
) -> tuple[TreePlan, list[PlannedTier]]:
    """Search every tier of load.

    Args:
        evidence: chances of the candidates.
        profile: seconds of a step by load and rows.
        max_rows: most rows per request and step, root included.
        num_ept: rows per prompt token.
        max_requests: the server's own limit; no tiers beyond it.

    Returns:
        the plan, whose last tier serves every larger load, and per tier (equal ones
        not merged) what was expected.
    """
    planned: list[PlannedTier] = []
    found: EvidencePolicy | None = None
    for requests in _LIMITS:
        curve = profile.curve(requests)
        found = best_policy(evidence, curve, max_rows, num_ept, start=found)
        plain = 1 / float(curve.seconds[0])
        planned.append(PlannedTier(requests, found, found.tokens_per_second / plain))
        # What does not pay at some load does not pay at a higher one.
        if requests >= max_requests or not planned[-1].speculates:
            break
    tiers: list[Tier] = []
    for index, each in enumerate(planned):
        limit = None if index == len(planned) - 1 else each.requests
        tier = each.found.tier(limit) if each.speculates else Tier(limit)
        if tiers and tiers[-1].policies == tier.policies:
            tiers.pop()
        tiers.append(tier)
    return TreePlan(tuple(tiers)), planned
