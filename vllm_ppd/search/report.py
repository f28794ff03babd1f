"""What a plan is expected to do at a load: tokens, rows and time of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.plan_search import shared_curve
from vllm_ppd.search.policy_iteration import node_chances, policy_value
from vllm_ppd.search.profile import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.ngram import LENGTHS
from vllm_ppd.trees.tree import SparseTree, TreeError

__all__ = ["LoadFigures", "StateFigures", "evidence_for", "load_figures", "load_labels"]


@dataclass(frozen=True)
class StateFigures:
    """One tree of a tier, and what is expected of it.

    Attributes:
        match_class: 0 without an earlier match.
        state: prompt tokens whose outputs are at hand.
        tree: the tree.
        share: part of the steps that are made with it.
        reached: [nodes] chance that verification reaches each node, root (1) first.
    """

    match_class: int
    state: int
    tree: SparseTree
    share: float
    reached: np.ndarray

    @property
    def tokens(self) -> float:
        """Mean tokens of a step with this tree."""
        return float(self.reached.sum())


@dataclass(frozen=True)
class LoadFigures:
    """The mean step at one load.

    Attributes:
        requests: that run at once.
        tier: index in the plan.
        tau: tokens per step of one request.
        mean_rows: rows per step of one request, padding left out.
        seconds: of a step, in the profile's unit.
        plain_seconds: of a step without speculation at that load.
        states: by match class and state; empty where the tier does not speculate.
    """

    requests: int
    tier: int
    tau: float
    mean_rows: float
    seconds: float
    plain_seconds: float
    states: tuple[StateFigures, ...] = ()

    @property
    def gain(self) -> float:
        """Speed relative to plain decoding at that load."""
        return self.tau * self.plain_seconds / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.requests * self.tau / self.seconds

    @property
    def plain_tokens_per_second(self) -> float:
        return self.requests / self.plain_seconds


def evidence_for(plan: TreePlan, acceptance: AcceptanceModel) -> AcceptanceModel:
    """The chances that a plan's steps see: matches count where it has trees for them.

    Raises TreeError for a number of match classes that is never served.
    """
    if plan.num_classes == 1:
        return acceptance.without_chains()
    if plan.num_classes != len(LENGTHS) + 1:
        raise TreeError(
            f"the plan has policies for {plan.num_classes} match classes; serving "
            f"knows {len(LENGTHS) + 1}, or 1 where no earlier matches are used"
        )
    return acceptance.with_typical_chains()


def load_figures(
    plan: TreePlan,
    acceptance: AcceptanceModel,
    profile: LatencyProfile,
    requests: int,
    fixed_rows: bool = False,
) -> LoadFigures:
    """What `plan` is expected to do while `requests` requests run.

    acceptance: of `evidence_for`.
    fixed_rows: of `PlanSettings`; then every step has the rows of the largest tree.
    """
    curve = profile.curve(requests)
    plain = curve.plain_s
    index = plan.tier_index(requests)
    tier = plan.tiers[index]
    if not tier.policies:
        return LoadFigures(requests, index, 1.0, 1.0, plain, plain)
    trees = [policy.trees for policy in tier.policies]
    if fixed_rows:
        curve = LatencyCurve.constant(curve(max(p.max_rows for p in tier.policies)))
    tau, speed, shares = policy_value(trees, acceptance, curve)
    states = _states(tier, acceptance, shares)
    rows = sum(each.share * each.tree.num_rows for each in states)
    if requests > 1 and not fixed_rows:
        # Requests pay for each other's guesses, as the search has it.
        bare = sum(each.share for each in states if each.tree.num_rows == 1)
        paid = 1 - min(bare, 1.0) ** (requests - 1)
        speed = policy_value(trees, acceptance, shared_curve(curve, paid, rows))[1]
    return LoadFigures(requests, index, tau, rows, tau / speed, plain, states)


def _states(
    tier: Tier, acceptance: AcceptanceModel, shares: np.ndarray
) -> tuple[StateFigures, ...]:
    return tuple(
        StateFigures(
            match_class,
            state,
            tree,
            # Least squares may leave a hair below zero.
            max(0.0, float(shares[match_class, state])),
            node_chances(tree, acceptance, state, match_class),
        )
        for match_class, policy in enumerate(tier.policies)
        for state, tree in enumerate(policy.trees)
    )


def load_labels(loads: Sequence[int]) -> list[str]:
    """Ranges of running requests that end at rising `loads`, the last without end."""
    labels = []
    for before, load in zip([0, *loads], loads, strict=False):
        first = before + 1
        labels.append(f"{first}" if first == load else f"{first}-{load}")
    if loads:
        labels[-1] = f"{loads[-2] + 1 if len(loads) > 1 else 1} on"
    return labels
