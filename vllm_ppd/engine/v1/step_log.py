"""A line in the server's log now and then, and the counts behind the metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from vllm.logger import init_logger

from vllm_ppd.engine.step_counts import StepCounts
from vllm_ppd.trees.step import TreeStep
from vllm_ppd.trees.verify import TreeWalk

if TYPE_CHECKING:
    from vllm_ppd.engine.v1.served_trees import PPDProposer

__all__ = ["EVERY", "StepLog"]

logger = init_logger("vllm.ppd")

_SECONDS = 10.0
# Steps between looks.
EVERY = 8


class StepLog:
    """Looks at every eighth step; logs every ten seconds of traffic."""

    def __init__(self, counts: StepCounts) -> None:
        self.counts = counts
        self._steps = 0
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._logged: np.ndarray = np.array(self.counts.values)

    def after_step(
        self,
        drafter: PPDProposer,
        running: int,
        step: TreeStep | None,
        walk: TreeWalk | None,
        changes: int,
    ) -> None:
        """Look at every eighth step, one with guesses or without.

        changes: how often the traffic has changed the plan.
        """
        self._steps += 1
        if self._steps % EVERY:
            return
        if step is None or walk is None:
            self.counts.add_plain(running)
        else:
            self.counts.add(step, walk, drafter.tree_states[step.states])
        tier = drafter.plan.tiers[drafter.plan.tier_index(running, drafter.context)]
        self.say(tier.max_requests, changes)

    def say(self, tier_max_requests: int | None, changes: int) -> None:
        """Note the plan as `StepCounts.set_plan` does; log if it is time."""
        self.counts.set_plan(tier_max_requests, changes)
        if time.monotonic() - self._since > _SECONDS:
            logger.info(self.line())
            self._reset()

    def line(self) -> str:
        """What was seen since the last line."""
        return self.counts.line(self._logged)
