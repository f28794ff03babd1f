"""A line in the server's log now and then: what the trees do."""

from __future__ import annotations

import time

import numpy as np
from vllm.logger import init_logger

from vllm_ppd.engine.proposer import PPDProposer
from vllm_ppd.step import TreeStep
from vllm_ppd.verify import TreeWalk

__all__ = ["StepLog"]

logger = init_logger("vllm.ppd")

_SECONDS = 10.0
# Steps between looks.
_EVERY = 8


class StepLog:
    """Sums over the steps looked at; logs every ten seconds of traffic."""

    def __init__(self) -> None:
        self._steps = 0
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._requests = self._speculating = 0
        self._tokens = self._rows = self._nodes = 0
        self._chain_tokens = self._guessed = 0
        self._states = np.zeros(0)
        self._running = 0

    def after_step(
        self,
        drafter: PPDProposer,
        running: int,
        step: TreeStep | None,
        walk: TreeWalk | None,
    ) -> None:
        """Look at every eighth step, one with guesses or without."""
        self._steps += 1
        if self._steps % _EVERY:
            return
        self._requests += running
        self._running = running
        if step is None or walk is None:
            self._tokens += running
            self._rows += running
        else:
            self._add(drafter, step, walk)
        if time.monotonic() - self._since > _SECONDS:
            logger.info(self.line(drafter))
            self._reset()

    def _add(self, drafter: PPDProposer, step: TreeStep, walk: TreeWalk) -> None:
        guessing = step.num_rows > 1
        self._speculating += int(guessing.sum())
        self._tokens += int(walk.lengths.sum())
        self._rows += int(step.num_rows.sum())
        self._nodes += int(step.num_nodes.sum()) - len(step.states)
        self._guessed += int(walk.lengths.sum()) - len(walk.lengths)
        on_chain = step.tables.on_chain[step.states, walk.nodes]
        depths = step.tables.candidate_depths[step.states, walk.nodes]
        self._chain_tokens += int(depths[on_chain].sum())
        states = drafter.tree_states[step.states[guessing]]
        if len(self._states) != drafter.num_states:
            self._states = np.zeros(drafter.num_states)
        self._states += np.bincount(states, minlength=drafter.num_states)

    def line(self, drafter: PPDProposer) -> str:
        """What was seen since the last line."""
        requests = max(1, self._requests)
        tier = drafter.plan.tiers[drafter.plan.tier_index(self._running)]
        limit = (
            "any number of" if tier.max_requests is None else f"<= {tier.max_requests}"
        )
        tokens, rows = self._tokens / requests, self._rows / requests
        text = (
            f"PPD: {tokens:.2f} tokens and {rows:.1f} rows per request and step; "
            f"guesses in {self._speculating / requests:.0%} of steps; tier for "
            f"{limit} requests"
        )
        if self._guessed:
            accepted = self._guessed / max(1, self._nodes)
            chains = self._chain_tokens / self._guessed
            text += (
                f"; {accepted:.0%} of candidates right, {chains:.0%} of those from "
                "earlier text"
            )
        if self._states.sum():
            shares = self._states / self._states.sum()
            text += "; steps by prompt tokens at hand: " + ", ".join(
                f"{state}: {share:.0%}" for state, share in enumerate(shares)
            )
        return text
