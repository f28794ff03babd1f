"""Trees that follow the traffic: count what came true, change the plan when it pays.

Counts and plans depend on the tokens alone, so that the ranks of a tensor-parallel
group, which see the same tokens, change their trees in the same step. Only a rank that
is alone also goes by the clock.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from vllm.logger import init_logger

from vllm_ppd.adaptive.chain_replay import Match, replay_chains
from vllm_ppd.adaptive.learning import EvidenceLearner
from vllm_ppd.adaptive.load_guard import LoadGuard
from vllm_ppd.adaptive.replan import Replanner, SearchPace
from vllm_ppd.adaptive.step_timing import StepTiming, corrected
from vllm_ppd.engine.v1.served_trees import PPDProposer
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.step import TreeStep
from vllm_ppd.trees.verify import TreeWalk

__all__ = ["OnlineTrees"]

logger = init_logger("vllm.ppd")

# Steps between looks: counting takes tens of microseconds, asking for a plan less. At
# first every step is counted, for nothing is known of the traffic yet. Where nobody
# guesses, looking for matches is pure cost, and rarer.
_COUNT_EVERY, _ASK_EVERY, _GLANCE_EVERY = 4, 32, 64
_COUNT_FIRST = 512
# There, what guesses would have done is found for the last tokens of so many requests
# at a time, in so many steps of each after those that only find where steps begin. It
# takes a millisecond or two.
_REPLAY_EVERY, _REPLAYED, _SPAN = 256, 8, 64
_SETTLING, _STEPS = 2, 16
# Share of the steps from which on a load is worth a search.
_SELDOM = 0.05
# With several ranks the answer is waited for, so many steps after the question.
_PATIENCE = 2048


class _Matched(NamedTuple):
    step: int
    request_ids: list[str]
    classes: np.ndarray
    ends: np.ndarray


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
        self._pace = SearchPace(by_clock=self._alone)
        self.changes = 0
        self._steps = self._asked_at = 0
        # Steps by running requests and their context since the last question.
        self._loads: Counter[tuple[int, int]] = Counter()
        # request -> (tokens before the chain, match class, chain)
        self._chains: dict[str, tuple[int, int, np.ndarray]] = {}
        # Tokens written without guesses, and those of steps replayed in them.
        self._written = self._replayed = 0.0
        # Step, requests, their match classes and lengths of the last look for matches.
        self._matched = _Matched(-1, [], np.empty(0), np.empty(0))

    def forget_request(self, request_id: str) -> None:
        self._chains.pop(request_id, None)

    def after_step(
        self, running: int, step: TreeStep | None, walk: TreeWalk | None
    ) -> bool:
        """Count a step of `running` requests; True if the plan is now another."""
        self._steps += 1
        # Contexts by powers of two.
        context = 1 << (self._drafter.context - 1).bit_length()
        self._loads[running, context] += 1
        if step is not None and walk is not None and self.counts_now:
            drafter = self._drafter
            states = drafter.tree_states[step.states]
            classes = drafter.tree_classes[step.states]
            self._learner.observe_walk(step, walk, states, classes)
        if self.glances_now and not self._drafter.first_tree(running):
            self._learner.pass_time(running)
        return self._steps % _ASK_EVERY == 0 and self._replan()

    def pays(
        self, step: TreeStep | None, running: int, emitted: int, all_rows: int, new: int
    ) -> bool:
        """Whether the next step should have guesses at this load, by the clock.

        Args:
            step: that ends.
            running, emitted: its requests, and the tokens that it emitted.
            all_rows: scheduled in it, of prompts too.
            new: requests that began with it.
        """
        if self._guard is None:
            return True
        rows = running if step is None else int(step.num_rows.sum())
        return self._guard.next_step(
            running, emitted, rows, all_rows - rows, new, self._drafter.context
        )

    def guesses(self, running: int) -> bool:
        """Whether steps may have guesses at this load; it counts nothing."""
        return self._guard is None or self._guard.guesses(running)

    @property
    def evidence(self) -> AcceptanceModel:
        """What is believed now."""
        return self._learner.evidence()

    @property
    def profile(self) -> LatencyProfile:
        """How long steps take, by what the clock has shown since."""
        return corrected(self._drafter.profile, self.timings)

    @property
    def timings(self) -> list[StepTiming]:
        """What the clock has shown; nothing where several ranks must agree."""
        return [] if self._guard is None else self._guard.timings

    @property
    def counts_now(self) -> bool:
        return self._counts_all or self._steps % _COUNT_EVERY == 0

    @property
    def _counts_all(self) -> bool:
        """At first, but steps that are timed are to take as long as later ones."""
        looking = self._guard is not None and self._guard.looking
        return self._steps < _COUNT_FIRST and not looking

    @property
    def glances_now(self) -> bool:
        """Whether to look for matches although nobody speculates at this load."""
        return self._steps % _GLANCE_EVERY == 0

    def glance(
        self,
        request_ids: list[str],
        token_ids: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        context: int,
        match: Match,
    ) -> None:
        """Learn from text that was written without guesses.

        Args:
            request_ids: [B].
            token_ids: [B, tokens] of each request.
            starts, ends: [B] where its own text begins, and its tokens so far.
            context: most tokens of a request in which matches are looked for.
            match: how they are found.
        """
        if not self._learner.places.classes:
            return
        batch = len(ends)
        if self._steps % _REPLAY_EVERY == 0:
            first = self._steps // _REPLAY_EVERY * _REPLAYED % batch
            some = slice(first, first + _REPLAYED)
            begin = np.maximum(starts[some], ends[some] - _SPAN)
            replayed = replay_chains(
                token_ids[some], begin, ends[some], context, _SETTLING, _STEPS, match
            )
            self._learner.observe_replay(replayed)
            self._replayed += float((1 + replayed.accepted).sum())
        self._written += _GLANCE_EVERY * batch
        classes, _ = match(token_ids, ends, context)
        share = min(1.0, self._replayed / self._written)
        self._count_changes(request_ids, classes, share)
        self._matched = _Matched(self._steps, list(request_ids), classes, ends.copy())

    def after_match(
        self,
        request_ids: list[str],
        classes: np.ndarray,
        chains: np.ndarray,
        tried: np.ndarray,
        ends: np.ndarray,
        token_ids: np.ndarray,
    ) -> None:
        """Check chains of before by what was written since, and keep new ones.

        Args:
            request_ids: [B].
            classes, chains: [B] and [B, L], of this step.
            tried: [B] whether the next walk will say how far the chain is right. Its
                steps begin where others failed; chains kept here begin anywhere, and
                so are right more often.
            ends: [B] tokens of each request so far.
            token_ids: [B, tokens] of each request.
        """
        before = self._matched
        if before.request_ids != request_ids:
            # Every change is counted, other moves now and then.
            weight = 1.0 if self._counts_all else 1 / _COUNT_EVERY
            self._count_changes(request_ids, classes, weight)
        elif self.counts_now and before.step == self._steps - 1:
            went_on = ends > before.ends
            accepted = ends > before.ends + 1
            self._learner.observe_moves(
                before.classes[went_on], classes[went_on], accepted[went_on]
            )
        # Lists and lengths are the runner's own and change.
        self._matched = _Matched(self._steps, list(request_ids), classes, ends.copy())
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
            if classes[index] and not tried[index]:
                chain = chains[index]
                self._chains[request_id] = (
                    int(ends[index]),
                    int(classes[index]),
                    chain[chain >= 0].copy(),
                )

    def _count_changes(
        self, request_ids: list[str], classes: np.ndarray, weight: float
    ) -> None:
        """Requests that ended since, and those in their place: texts begin without
        matches, and how often they begin is part of what a plan is worth.

        weight: share of the steps that are counted beside them.
        """
        before = self._matched
        ended, begun = set(before.request_ids), set(request_ids)
        gone = [
            match_class
            for request_id, match_class in zip(
                before.request_ids, before.classes.tolist(), strict=True
            )
            if request_id not in begun
        ]
        new = [
            match_class
            for request_id, match_class in zip(
                request_ids, classes.tolist(), strict=True
            )
            if request_id not in ended
        ]
        pairs = min(len(gone), len(new))
        if pairs:
            self._learner.observe_ends(
                np.array(gone[:pairs]), np.array(new[:pairs]), weight
            )

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
            self._pace.ended()
            if plan is None:
                return False
            drafter.set_plan(plan)
            self.changes += 1
            if self._guard is not None:
                self._guard.renew()
            logger.debug("PPD changed its trees to what the traffic accepts")
            return True
        if self._pace.due(self._learner.observations):
            settings = drafter.plan_settings
            replanner.submit(
                self._learner.evidence(),
                self.profile,
                drafter.plan,
                max_rows=min(settings.max_rows, drafter.num_rows),
                num_ept=settings.num_ept,
                max_requests=settings.max_requests,
                measured=settings.measured,
                max_context=settings.max_context,
                loads=self._usual_loads(),
            )
            self._learner.forget()
            self._loads.clear()
            self._asked_at = self._steps
            self._pace.begun()
        return False

    def _usual_loads(self) -> list[tuple[int, int]]:
        """Running requests and contexts that make up most steps; others can wait."""
        least = _SELDOM * self._loads.total()
        return sorted(load for load, steps in self._loads.items() if steps >= least)

    def close(self) -> None:
        self._replanner.close()
