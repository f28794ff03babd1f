"""Which plan is served: the user's own, or the best one for what is known.

The front end chooses to know how many rows a step may have, and each worker chooses
again from the same settings, so that the trees themselves are no part of what keys
compiled graphs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ppd.config import PPDConfigError
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.defaults import evidence_of
from vllm_ppd.search.fixed_rows import best_fixed_plan
from vllm_ppd.search.plan_search import PlannedTier, best_plan
from vllm_ppd.search.profile import LatencyProfile, default_profile
from vllm_ppd.trees.bigram import BIGRAM_FILE, BigramTable
from vllm_ppd.trees.menu import TreePlan

__all__ = ["PlanSettings"]

# A bigram table that starts empty: next tokens listed, and how much of its gain to
# add to prompt rows' logits, which calibration would have measured.
_LEARNT_SIZE, _LEARNT_WEIGHT = 16, 0.8


@dataclass(frozen=True)
class PlanSettings:
    """Everything a plan depends on, as JSON values."""

    path: str
    """Folder of the prompt tokens."""
    num_prompt_tokens: int
    num_ept: int
    device: str
    """"cpu" or "cuda"."""
    max_rows: int
    """Most rows per request and step, root included."""
    max_requests: int
    """Most requests that run at once."""
    max_context: int = 1
    """Most tokens of a request; 1 does not tell contexts apart."""
    tree: str | None = None
    """File of a policy or plan to serve as it is."""
    conditioned: bool = False
    """A bigram table is used."""
    suffix: bool = True
    """Earlier matches are looked for."""
    measured: bool = True
    """The engine gives up speculation where it measures that it does not pay."""
    fixed_rows: bool = False
    """All requests of a step have as many rows as the tier's largest tree."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def acceptance(self) -> AcceptanceModel:
        return evidence_of(
            Path(self.path), self.num_prompt_tokens, self.conditioned, self.suffix
        )

    def bigram(self, vocab_size: int, learns: bool) -> BigramTable | None:
        """The folder's bigram table, or an empty one that will learn, or none.

        Raises:
            BigramError: a file that cannot be used.
        """
        m = self.num_prompt_tokens
        if self.conditioned:
            return BigramTable.load(Path(self.path) / BIGRAM_FILE, vocab_size, m)
        if learns:
            weights = (_LEARNT_WEIGHT,) * m
            return BigramTable.empty(vocab_size, _LEARNT_SIZE, weights)
        return None

    def given_plan(self) -> TreePlan | None:
        """The user's own plan, if there is one.

        Raises:
            TreeError: a file that cannot be used.
            PPDConfigError: a plan for other prompt tokens, with more rows than
                allowed, or with guesses that nothing here can make.
        """
        if self.tree is None:
            return None
        plan = TreePlan.load(self.tree)
        ours = self.num_prompt_tokens, self.num_ept
        theirs = plan.num_prompt_tokens, plan.num_ept
        if plan.speculating and theirs != ours:
            raise PPDConfigError(
                f"the tree policy {self.tree} is for {theirs[0]} prompt tokens of "
                f"{theirs[1]} EPT, but {self.path} holds {ours[0]} of {ours[1]}"
            )
        if plan.max_rows > self.max_rows:
            raise PPDConfigError(
                f"num_speculative_tokens is {self.max_rows - 1}, too small for the "
                f"tree policy {self.tree}, which needs {plan.max_rows - 1}"
            )
        if self.fixed_rows and plan != plan.at_context(1):
            raise PPDConfigError(
                f"the plan {self.tree} tells contexts apart, and vLLM's V2 runner goes "
                "by running requests alone: leave out max_context"
            )
        if not self.conditioned:
            for tier in plan.speculating:
                tier.policies[0].require_prompted()
        return plan

    def choose(
        self, profile: LatencyProfile | None
    ) -> tuple[TreePlan, list[PlannedTier]]:
        """The plan, and what the search expects of each tier (nothing if given).

        profile: the machine's; None for a typical one.
        """
        plan = self.given_plan()
        if plan is not None:
            return plan, []
        acceptance = self.acceptance()
        known = profile or default_profile(self.device)
        limits = self.max_rows, self.num_ept, self.max_requests, self.measured
        if self.fixed_rows:
            return best_fixed_plan(acceptance, known, *limits)
        return best_plan(acceptance, known, *limits, self.max_context)
