"""The log and metrics of a step, counted on the device and read some steps late."""

from __future__ import annotations

import torch

from vllm_ppd.engine.step_counts import Slot, StepCounts
from vllm_ppd.engine.v1.step_log import EVERY, StepLog
from vllm_ppd.engine.v2.host_copy import HostCopy
from vllm_ppd.engine.v2.request_trees import DeviceTrees
from vllm_ppd.kernels.step_counts import count_step

__all__ = ["DeviceStepLog"]


class DeviceStepLog:
    """Looks at every eighth step, as on V1; the host never waits for what it sees.

    Args:
        trees: of the runner.
        counts: where the sums are published.
    """

    def __init__(self, trees: DeviceTrees, counts: StepCounts):
        self._trees = trees
        self._log = StepLog(counts)
        # Of verified steps; plain ones are known on the host.
        device = trees.trees.device
        self._sums = torch.zeros(len(counts.values), dtype=torch.int64, device=device)
        self._copy = HostCopy(self._sums)
        self._plain = 0
        self._steps = 0

    def after_step(self, running: int, changes: int) -> None:
        """Count a step of so many requests, which has just been verified.

        changes: how often the traffic has changed the plan.
        """
        self._steps += 1
        if self._steps % EVERY == 0:
            self._count(running)
            self._copy.start()
        arrived = self._copy.take()
        if arrived is None:
            return
        arrived[[Slot.PLAIN, Slot.TOKENS, Slot.ROWS]] += self._plain
        self._log.counts.values[:] = arrived
        plan = self._trees.plan
        self._log.say(plan.tiers[plan.tier_index(running)].max_requests, changes)

    def _count(self, running: int) -> None:
        trees = self._trees
        if trees.walk is None:
            self._plain += running
            return
        count_step(
            self._sums,
            trees.tables,
            trees.tree_states,
            trees.trees[:running],
            trees.num_rows[:running],
            trees.walk,
        )

    def line(self) -> str:
        """What was seen since the last line."""
        return self._log.line()
