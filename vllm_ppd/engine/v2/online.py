"""V2's trees follow the traffic, within the rows that vLLM schedules.

What walks show is summed on the device and arrives some steps late; a search beside the
engine looks for better trees; they are exchanged between two steps. How many rows a
load has stays as it was at the start. Ranks of a tensor-parallel group, whose sums
arrive at different steps, do not learn.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_ppd.adaptive.learning import EvidenceLearner
from vllm_ppd.adaptive.replan import Replanner, SearchPace
from vllm_ppd.engine.v2.evidence_sums import EvidenceSums
from vllm_ppd.engine.v2.host_copy import HostCopy
from vllm_ppd.engine.v2.request_trees import DeviceTrees
from vllm_ppd.search.plan_choice import PlanSettings

__all__ = ["DeviceOnlineTrees"]

logger = init_logger("vllm.ppd")

# Steps between looks, and between questions.
COUNT_EVERY, ASK_EVERY = 4, 32
# A move counts as often as the two that are counted where a request follows another.
_WEIGHT = 2 * COUNT_EVERY


class DeviceOnlineTrees:
    """The learning of one engine.

    Args:
        trees: of the runner, which follow.
        settings: what the first plan was chosen by.

    Attributes:
        changes: how often the trees have changed.
    """

    def __init__(self, trees: DeviceTrees, settings: PlanSettings):
        self._trees = trees
        self._num_ept = settings.num_ept
        # What vLLM schedules at each load.
        self._rows = [
            max((policy.max_rows for policy in tier.policies), default=1)
            for tier in trees.served_plan.tiers
        ]
        self._learner = EvidenceLearner(settings.evidence())
        self._sums = EvidenceSums(self._learner.places, trees.trees.device)
        self._copy = HostCopy(self._sums.values)
        self._seen = np.zeros(len(self._sums.values), dtype=np.int64)
        self._replanner = Replanner()
        self._pace = SearchPace(by_clock=True)
        self.changes = 0
        self._steps = 0
        trees.begun = self._sums.add_ends

    @torch.inference_mode()
    def after_step(self, running: int) -> None:
        """A step of so many requests is over, and the next one's guesses are made."""
        self._steps += 1
        if self._trees.walk is not None and self._steps % COUNT_EVERY == 0:
            self._count(running)
            self._copy.start()
        arrived = self._copy.take()
        if arrived is not None:
            self._learn(arrived)
        if self._steps % ASK_EVERY == 0:
            self._replan()

    def _count(self, running: int) -> None:
        trees = self._trees
        assert trees.walk is not None
        ids, rows = trees.trees[:running], trees.num_rows[:running]
        self._sums.add_walk(
            trees.tables, trees.tree_states, trees.tree_classes, ids, rows, trees.walk
        )
        if trees.matched is not None:
            # A request of one row may still be reading its prompt. Requests that begin
            # are counted always, other moves now and then.
            counts = (rows > 1).long() * _WEIGHT
            accepted = trees.walk.num_sampled[:running] > 1
            before = trees.tree_classes[ids]
            self._sums.add_moves(before, trees.matched[:running], counts, accepted)

    def _learn(self, arrived: np.ndarray) -> None:
        new = self._sums.parts(arrived - self._seen)
        self._seen = arrived
        self._learner.observe_sums(
            new.tries, new.hits, new.moves / _WEIGHT, float(new.tokens[0])
        )

    def _replan(self) -> None:
        replanner = self._replanner
        if replanner.busy:
            plan = replanner.take()
            if replanner.busy:
                return
            self._pace.ended()
            if plan is not None:
                self._trees.set_plan(plan)
                self.changes += 1
                logger.debug("PPD changed its trees to what the traffic accepts")
        elif self._pace.due(self._learner.observations):
            replanner.submit(
                self._learner.evidence(),
                None,
                self._trees.served_plan,
                num_ept=self._num_ept,
                rows=self._rows,
            )
            self._learner.forget()
            self._pace.begun()

    def close(self) -> None:
        self._replanner.close()
