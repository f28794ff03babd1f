"""A line in the server's log now and then, and the counts behind the metrics."""

from __future__ import annotations

import time

import numpy as np
from vllm.logger import init_logger

from vllm_ppd.engine.proposer import PPDProposer
from vllm_ppd.step import TreeStep
from vllm_ppd.step_counts import StepCounts
from vllm_ppd.verify import TreeWalk

__all__ = ["StepLog"]

logger = init_logger("vllm.ppd")

_SECONDS = 10.0
# Steps between looks.
_EVERY = 8


class StepLog:
    """Looks at every eighth step; logs every ten seconds of traffic."""

    def __init__(self, counts: StepCounts) -> None:
        self._counts = counts
        self._steps = 0
        self._running = 0
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._logged: np.ndarray = np.array(self._counts.values)

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
        self._running = running
        if self._steps % _EVERY:
            return
        counts = self._counts
        if step is None or walk is None:
            counts.add_plain(running)
        else:
            counts.add(step, walk, drafter.tree_states[step.states])
        tier = drafter.plan.tiers[drafter.plan.tier_index(running)]
        counts.set_plan(tier.max_requests, changes)
        if time.monotonic() - self._since > _SECONDS:
            logger.info(self.line())
            self._reset()

    def line(self) -> str:
        """What was seen since the last line."""
        return self._counts.line(self._logged)
