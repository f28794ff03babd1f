"""Which tree a request gets: by load, by evidence, by state.

A plan holds tiers of load. A tier is for up to so many running requests and has one
`TreePolicy` for each *match class*: 0 where the request's last tokens have no earlier
match in its own context, 1, 2, ... for longer and longer matches. A tier without
policies does not speculate at all: its steps are vLLM's own.

Where long contexts change what rows cost each range of them has its tiers of load.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy

__all__ = ["Tier", "TreePlan"]

FORMAT = "ppd_tree_plan"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Tier:
    """The trees for one range of load.

    Attributes:
        max_requests: most running requests that this tier serves; None for any number.
        policies: one policy per match class; empty where speculation does not pay.
        max_context: longest mean context of those requests, in tokens; None for any.
    """

    max_requests: int | None
    policies: tuple[TreePolicy, ...] = ()
    max_context: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        for name in ("max_requests", "max_context"):
            most = getattr(self, name)
            if most is not None and (isinstance(most, bool) or not int(most) >= 1):
                raise TreeError(f"{name} is {most!r}; expected 1 or more, or null")
        if len({(p.num_prompt_tokens, p.num_ept) for p in self.policies}) > 1:
            raise TreeError("all policies of a tier must be for the same prompt tokens")


@dataclass(frozen=True)
class TreePlan:
    """Tiers by rising context, and for each by rising load; last ones have no limit.

    ``trees`` lists every tree once: first a bare root, which serves rows that vLLM
    scheduled although nobody guessed, then tier by tier, class by class, state by
    state. The index in this list is the *tree id* by which a step finds its tree.

    Raises:
        TreeError: no tier, limits that do not rise, a last tier with a limit, or
            tiers for different prompt tokens or numbers of match classes.
    """

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        if not self.tiers:
            raise TreeError("a plan needs at least one tier")
        contexts = []
        for context, tiers in groupby(self.tiers, lambda tier: tier.max_context):
            contexts.append(context)
            _require_rising([tier.max_requests for tier in tiers], "tier")
        _require_rising(contexts, "context range")
        shapes = {
            (len(t.policies), t.policies[0].num_prompt_tokens, t.policies[0].num_ept)
            for t in self.tiers
            if t.policies
        }
        if len(shapes) > 1:
            raise TreeError(
                "all tiers of a plan must be for the same prompt tokens and have the "
                "same number of match classes"
            )

    @classmethod
    def of(cls, policy: TreePolicy) -> TreePlan:
        """One policy for every load and all evidence."""
        return cls((Tier(None, (policy,)),))

    @classmethod
    def by_context(cls, plans: Sequence[tuple[int | None, TreePlan]]) -> TreePlan:
        """Plans that do not tell contexts apart, each up to so many tokens; equal
        neighbours are merged."""
        tiers: list[Tier] = []
        for index, (most, plan) in enumerate(plans):
            if index + 1 < len(plans) and plans[index + 1][1] == plan:
                continue
            tiers += (replace(tier, max_context=most) for tier in plan.tiers)
        return cls(tuple(tiers))

    def at_context(self, context: int) -> TreePlan:
        """The tiers for one mean context, as a plan that does not tell them apart."""
        most = self.tiers[self.tier_index(1, context)].max_context
        chosen = (tier for tier in self.tiers if tier.max_context == most)
        return TreePlan(tuple(replace(tier, max_context=None) for tier in chosen))

    @cached_property
    def speculating(self) -> tuple[Tier, ...]:
        """The tiers that speculate."""
        return tuple(tier for tier in self.tiers if tier.policies)

    @property
    def num_classes(self) -> int:
        """Match classes, the one without a match included; 1 without suffixes."""
        return len(self.speculating[0].policies) if self.speculating else 1

    @property
    def num_prompt_tokens(self) -> int:
        if not self.speculating:
            return 1
        return self.speculating[0].policies[0].num_prompt_tokens

    @property
    def num_ept(self) -> int:
        return self.speculating[0].policies[0].num_ept if self.speculating else 1

    @cached_property
    def trees(self) -> tuple[SparseTree, ...]:
        bare = SparseTree((), (), (0,), self.num_ept)
        return (
            bare,
            *(
                tree
                for tier in self.speculating
                for policy in tier.policies
                for tree in policy.trees
            ),
        )

    @cached_property
    def chained(self) -> tuple[bool, ...]:
        """For each tree whether its chain follows an earlier match."""
        return (
            False,
            *(
                match_class > 0
                for tier in self.speculating
                for match_class, policy in enumerate(tier.policies)
                for _ in policy.trees
            ),
        )

    @cached_property
    def first_trees(self) -> tuple[int, ...]:
        """For each tier the tree id of its class 0, state 0; 0 where it is off."""
        ids, at = [], 1
        for tier in self.tiers:
            ids.append(at if tier.policies else 0)
            at += sum(len(policy.trees) for policy in tier.policies)
        return tuple(ids)

    @property
    def max_rows(self) -> int:
        return max(tree.num_rows for tree in self.trees)

    @property
    def max_rank(self) -> int:
        return max(max(tree.ranks, default=-1) for tree in self.trees)

    def tier_index(self, running: int, context: int = 1) -> int:
        """The tier for so many running requests of that many tokens in the mean."""
        for index, tier in enumerate(self.tiers):
            if (tier.max_context is None or context <= tier.max_context) and (
                tier.max_requests is None or running <= tier.max_requests
            ):
                return index
        raise AssertionError("the last tier has no limit")

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tiers": [
                {
                    **({"max_context": most} if (most := tier.max_context) else {}),
                    "max_requests": tier.max_requests,
                    "policies": [policy.to_dict() for policy in tier.policies],
                }
                for tier in self.tiers
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> TreePlan:
        """Read a plan, or a single policy as a plan for every load; strict."""
        if isinstance(data, dict) and data.get("format") == "ppd_tree_policy":
            return cls.of(TreePolicy.from_dict(data))
        _require(data, ("format", "format_version", "tiers"), "plan")
        if data["format"] != FORMAT or data["format_version"] != FORMAT_VERSION:
            raise TreeError(
                f"format is {data['format']!r} {data['format_version']!r}; expected "
                f"{FORMAT!r} {FORMAT_VERSION}, or a 'ppd_tree_policy'"
            )
        if not isinstance(data["tiers"], list):
            raise TreeError("'tiers' must be a list")
        tiers = []
        for tier in data["tiers"]:
            keys = ("max_requests", "policies")
            _require(tier, keys, "tier", optional=("max_context",))
            if not isinstance(tier["policies"], list):
                raise TreeError("'policies' must be a list, one per match class")
            policies = [TreePolicy.from_dict(policy) for policy in tier["policies"]]
            context = tier.get("max_context")
            tiers.append(Tier(tier["max_requests"], tuple(policies), context))
        return cls(tuple(tiers))

    @classmethod
    def load(cls, path: Path | str) -> TreePlan:
        """Read a file; raises TreeError that names it."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            raise TreeError(f"cannot read the tree policy {path}: {error}") from error
        except json.JSONDecodeError as error:
            raise TreeError(f"{path} is not JSON: {error}") from error
        except (TreeError, TypeError, ValueError) as error:
            raise TreeError(f"{path} is not a usable tree policy: {error}") from error


def _require_rising(limits: Sequence[int | None], what: str) -> None:
    """Limits that end with none, and no other is none."""
    if not limits or limits[-1] is not None or None in limits[:-1]:
        raise TreeError(f"the last {what} of a plan, and no other, has no limit")
    known = [limit for limit in limits if limit is not None]
    if sorted(set(known)) != known:
        raise TreeError(f"the limits of a plan's {what}s must rise, not {known}")


def _require(
    data: Any, keys: Sequence[str], what: str, optional: Sequence[str] = ()
) -> None:
    if not isinstance(data, dict):
        raise TreeError(f"{what} must be a JSON object, not {type(data).__name__}")
    if unknown := sorted(set(data) - {*keys, *optional}):
        raise TreeError(f"unknown key {unknown[0]!r} in the {what}")
    if missing := sorted(set(keys) - set(data)):
        raise TreeError(f"key {missing[0]!r} is missing in the {what}")
