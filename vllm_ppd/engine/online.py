"""Trees that follow the traffic: count what came true, change the plan when it pays.

Counts and plans depend on the tokens alone, so that the ranks of a tensor-parallel
group, which see the same tokens, change their trees in the same step. Only a rank that
is alone also goes by the clock.
"""

from __future__ import annotations

import time

import numpy as np
from vllm.logger import init_logger

from vllm_ppd.engine.proposer import PPDProposer
from vllm_ppd.evidence import Evidence
from vllm_ppd.learning import EvidenceLearner
from vllm_ppd.load_guard import LoadGuard
from vllm_ppd.replan import Replanner
from vllm_ppd.step import TreeStep
from vllm_ppd.verify import TreeWalk

__all__ = ["OnlineTrees"]

logger = init_logger("vllm.ppd")

# Steps between looks: counting takes tens of microseconds, asking for a plan less.
_COUNT_EVERY, _ASK_EVERY, _GLANCE_EVERY = 4, 64, 16
# Tokens counted before another plan is searched: twice as many each time that none was
# found to be better, because the search takes a core for seconds.
_ENOUGH, _MOST = 600.0, 100_000.0
# A rank that is alone rests so many times as long as its last search took.
_REST = 10.0
# With several ranks the answer is waited for, so many steps after the question.
_PATIENCE = 2048


class OnlineTrees:
    """The learning of one worker.

    Args:
        drafter: whose plan follows.
        ranks: tensor-parallel ranks that must stay together.
    """

    def __init__(self, drafter: PPDProposer, ranks: int):
        self._drafter = drafter
        self._alone = ranks == 1
        self._guard = LoadGuard() if self._alone else None
        self._learner = EvidenceLearner(drafter.plan_settings.evidence())
        self._replanner = Replanner()
        self.changes = 0
        self._steps = self._asked_at = 0
        self._asked_s = self._rested_s = 0.0
        self._enough = _ENOUGH
        # request -> (tokens before the chain, match class, chain)
        self._chains: dict[str, tuple[int, int, np.ndarray]] = {}

    def forget_request(self, request_id: str) -> None:
        self._chains.pop(request_id, None)

    def after_step(self, step: TreeStep | None, walk: TreeWalk | None) -> bool:
        """Count a step; True if the drafter has another plan from now on."""
        self._steps += 1
        if step is not None and walk is not None and self.counts_now:
            drafter = self._drafter
            states = drafter.tree_states[step.states]
            classes = drafter.tree_classes[step.states]
            self._learner.observe_walk(step, walk, states, classes)
        return self._steps % _ASK_EVERY == 0 and self._replan()

    def pays(
        self, step: TreeStep | None, emitted: list[list[int]], all_rows: int
    ) -> bool:
        """Whether the next step should have guesses at this load, by the clock.

        Args:
            step, emitted: of the step that ends.
            all_rows: scheduled in it, of prompts too.
        """
        if self._guard is None:
            return True
        running = len(emitted)
        rows = running if step is None else int(step.num_rows.sum())
        tokens = sum(map(len, emitted))
        return self._guard.next_step(running, tokens, rows == all_rows)

    @property
    def evidence(self) -> Evidence:
        """What is believed now."""
        return self._learner.evidence()

    @property
    def counts_now(self) -> bool:
        return self._steps % _COUNT_EVERY == 0

    @property
    def glances_now(self) -> bool:
        """Whether to look for matches although nobody speculates at this load."""
        return self._steps % _GLANCE_EVERY == 0

    def after_match(
        self,
        request_ids: list[str],
        classes: np.ndarray,
        chains: np.ndarray,
        ends: np.ndarray,
        token_ids: np.ndarray,
    ) -> None:
        """Check chains of before by what was written since, and keep new ones.

        Args:
            request_ids: [B].
            classes, chains: [B] and [B, L], of this step.
            ends: [B] tokens of each request so far.
            token_ids: [B, tokens] of each request.
        """
        for index, request_id in enumerate(request_ids):
            kept = self._chains.get(request_id)
            if kept is not None:
                start, match_class, chain = kept
                end = start + len(chain)
                if ends[index] < end:
                    continue
                written = token_ids[index, start:end]
                self._learner.observe_chain(match_class, chain, written)
                del self._chains[request_id]
            if classes[index]:
                chain = chains[index]
                self._chains[request_id] = (
                    int(ends[index]),
                    int(classes[index]),
                    chain[chain >= 0].copy(),
                )

    def after_choice(self, before: np.ndarray, after: np.ndarray) -> None:
        """Count [B] match classes of this step's trees and of the next one's."""
        self._learner.observe_moves(before, after)

    def _replan(self) -> bool:
        drafter, replanner = self._drafter, self._replanner
        if replanner.busy:
            if self._alone:
                plan = replanner.take()
            elif self._steps - self._asked_at < _PATIENCE:
                return False
            else:
                plan = replanner.take(wait=True)
            if replanner.busy:
                return False
            now = time.monotonic()
            self._rested_s = now + _REST * (now - self._asked_s)
            self._enough = min(2 * self._enough, _MOST)
            if plan is None:
                return False
            self._enough = _ENOUGH
            drafter.set_plan(plan)
            self.changes += 1
            if self._guard is not None:
                self._guard.renew()
            logger.debug("PPD changed its trees to what the traffic accepts")
            return True
        if self._alone and time.monotonic() < self._rested_s:
            return False
        if self._learner.observations >= self._enough:
            settings = drafter.plan_settings
            replanner.submit(
                self._learner.evidence(),
                drafter.profile,
                drafter.plan,
                max_rows=min(settings.max_rows, drafter.num_rows),
                num_ept=settings.num_ept,
                max_requests=settings.max_requests,
                measured=settings.measured,
            )
            self._learner.forget()
            self._asked_at, self._asked_s = self._steps, time.monotonic()
        return False

    def close(self) -> None:
        self._replanner.close()
