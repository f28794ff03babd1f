"""Acceptance as traffic shows it: exponentially weighted counts of what came true.

Calibration texts are not the traffic, and sampling temperatures change everything, so
a serving engine goes on counting. Every walk says, for each candidate below a visited
node, whether it was right; a chain can be checked even where nobody speculated, by
looking at what was written next.

Calibrated chances give way to what is seen, in two steps, because most candidates are
tried rarely: what all candidates of a source show together shifts the whole source
(odds by one factor: traffic is harder or easier, or hotter, than the calibration), and
each chance so shifted counts as a few dozen observations of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vllm_ppd.adaptive.chain_replay import ReplayedSteps
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk

__all__ = ["EvidenceLearner", "Places"]

# Observations that a calibrated chance is worth, and a row of calibrated moves.
PRIOR, PRIOR_MOVES = 60.0, 20.0
# How far a source's log odds may be from the calibration's: one standard deviation.
_SHIFT = 1.0
# What remains of the counts each time they are used.
KEPT = 0.7


class Places(NamedTuple):
    """How candidates are told apart in flat counts, source after source."""

    prompts: int
    ranks: int
    classes: int
    """Match classes, the one without a match left out."""
    depths: int
    """Of a chain."""

    @classmethod
    def of(cls, evidence: AcceptanceModel) -> Places:
        m, ranks = evidence.prompted.shape
        classes, depths = evidence.chain.shape if len(evidence.chain) else (0, 0)
        return cls(m, ranks, classes, depths)

    @property
    def firsts(self) -> np.ndarray:
        """[5] where prompted, unprompted, chain and beside begin; how many in all."""
        m, ranks, classes, depths = self
        sizes = (m * ranks, ranks, classes * depths, classes * m * ranks)
        return np.concatenate([[0], np.cumsum(sizes)])


class EvidenceLearner:
    """Counts of one engine; `evidence` mixes them with what was known before.

    Args:
        prior: the evidence that the engine started with.
    """

    def __init__(self, prior: AcceptanceModel):
        self.prior = prior
        self.places = Places.of(prior)
        self._firsts = self.places.firsts
        classes = self.places.classes
        self._tries = np.zeros(self._firsts[-1])
        self._hits = np.zeros(self._firsts[-1])
        # Axis 0: the step accepted a guess.
        self._moves = np.zeros((2, classes + 1, classes + 1))
        self.observations = 0.0

    def observe_walk(
        self, step: TreeStep, walk: TreeWalk, states: np.ndarray, classes: np.ndarray
    ) -> None:
        """Count the candidates below every visited node.

        Args:
            step, walk: a finished step.
            states: [B] prompt tokens that each request's tree was filled with.
            classes: [B] its match class.
        """
        m, ranks, _, depths = self.places
        tables, trees = step.tables, step.states
        batch = np.arange(len(trees))
        width = tables.parents.shape[1]
        level = np.arange(walk.paths.shape[1])
        visited = np.zeros((len(trees), width), dtype=bool)
        visited[
            batch[:, None], np.where(level < walk.lengths[:, None], walk.paths, 0)
        ] = True
        present = np.arange(width) < step.num_nodes[:, None]
        parents = tables.parents[trees]
        tried = present & (parents >= 0)
        tried &= visited[batch[:, None], np.maximum(parents, 0)]
        request, node = np.nonzero(tried)
        if not len(request):
            return
        tree, parent = trees[request], parents[request, node]
        depth = tables.node_depths[tree, node] - 1
        rank = tables.node_ranks[tree, node]
        hit = visited[request, node]
        match = classes[request] - 1
        on = tables.on_ngram[tree, parent] & (match >= 0)
        prompted = depth < states[request]
        first = on & (rank == 0)
        # Beside a chain's token that was right, nothing else was put to the test.
        went_on = np.zeros((len(trees), width), dtype=bool)
        went_on[request[first & hit], parent[first & hit]] = True
        rank = np.where(on, rank - 1, rank)
        index = np.full(len(request), -1)
        usual = ~on & (rank < ranks)
        index = np.where(usual & prompted, depth * ranks + rank, index)
        index = np.where(usual & ~prompted, self._firsts[1] + rank, index)
        chain = first & (depth < depths)
        index = np.where(chain, self._firsts[2] + match * depths + depth, index)
        beside = on & ~first & prompted & (rank < ranks)
        beside &= ~went_on[request, parent]
        place = (match * m + np.minimum(depth, m - 1)) * ranks + rank
        index = np.where(beside, self._firsts[3] + place, index)
        known = index >= 0
        np.add.at(self._tries, index[known], 1)
        np.add.at(self._hits, index[known], hit[known])
        self.observations += float(walk.lengths.sum())

    def observe_chain(
        self, match_class: int, chain: np.ndarray, written: np.ndarray
    ) -> None:
        """Count a chain that may never have been tried: what was written next?

        chain, written: token ids; a chain longer than what was written counts as far.
        """
        depths = self.places.depths
        known = min(len(chain), len(written), depths)
        wrong = np.flatnonzero(chain[:known] != written[:known])
        right = int(wrong[0]) if len(wrong) else known
        first = self._firsts[2] + (match_class - 1) * depths
        self._tries[first : first + min(right + 1, known)] += 1
        self._hits[first : first + right] += 1
        self.observations += 1

    def observe_replay(self, steps: ReplayedSteps) -> None:
        """Count steps that chains would have made in text written without guesses."""
        depths = self.places.depths
        accepted, lengths = steps.accepted, steps.lengths
        request, depth = np.nonzero(
            (steps.classes[:, None] > 0)
            & (np.arange(depths) < lengths[:, None])
            & (np.arange(depths) <= accepted[:, None])
        )
        places = self._firsts[2] + (steps.classes[request] - 1) * depths + depth
        np.add.at(self._tries, places, 1)
        np.add.at(self._hits, places, depth < accepted[request])
        self.observe_moves(steps.classes, steps.after, accepted > 0)
        self.observations += float((1 + accepted).sum())

    def observe_moves(
        self, before: np.ndarray, after: np.ndarray, accepted: np.ndarray
    ) -> None:
        """Count [B] match classes of requests, and those of their next steps.

        accepted: [B] bool, whether the step between them accepted a guess.
        """
        np.add.at(self._moves, (accepted.astype(int), before, after), 1.0)

    def observe_ends(
        self, before: np.ndarray, after: np.ndarray, weight: float
    ) -> None:
        """Count [B] match classes of requests that ended, and of those in their place.

        Their last steps count as accepting as often as others of their class.
        """
        usual = self._moves.sum(axis=2)[:, before] + PRIOR_MOVES
        for accepted, share in enumerate(usual / usual.sum(axis=0)):
            np.add.at(self._moves[accepted], (before, after), weight * share)

    def observe_sums(
        self, tries: np.ndarray, hits: np.ndarray, moves: np.ndarray, tokens: float
    ) -> None:
        """Add counts that were made elsewhere.

        Args:
            tries, hits: [places] as `observe_walk` counts them.
            moves: [2, C + 1, C + 1] as `observe_moves` does.
            tokens: written in the steps that were counted.
        """
        self._tries += tries
        self._hits += hits
        self._moves += moves
        self.observations += tokens

    def pass_time(self, amount: float) -> None:
        """Nobody guesses by this plan: what was counted before grows old all the same.

        With each search older counts fade, so guesses that once failed are tried again.
        """
        self.observations += amount

    def evidence(self) -> AcceptanceModel:
        """What to believe now."""
        m, ranks, classes, _ = self.places
        prior = self.prior
        known = np.concatenate(
            [
                prior.prompted.ravel(),
                prior.unprompted.ravel(),
                prior.chain.ravel(),
                prior.beside.ravel(),
            ]
        )
        firsts = self._firsts
        for first, end in pairwise(firsts.tolist()):
            source = slice(first, end)
            known[source] = _shifted(
                known[source], self._tries[source], self._hits[source]
            )
        rates = (self._hits + PRIOR * known) / (self._tries + PRIOR)
        parts = np.split(rates, firsts[1:-1])
        moves = self._moves + PRIOR_MOVES * prior.moves
        prompted = parts[0].reshape(m, ranks)
        return AcceptanceModel(
            prompted=_bounded(prompted),
            unprompted=_bounded(parts[1]),
            chain=parts[2].reshape(prior.chain.shape),
            beside=_bounded(parts[3].reshape(classes, m, ranks)),
            moves=moves / moves.sum(axis=2, keepdims=True),
            overall=np.concatenate([_bounded(prompted), _bounded(parts[1])[None]]),
        )

    def forget(self) -> None:
        """Let later observations weigh more."""
        for counts in (self._tries, self._hits, self._moves):
            counts *= KEPT
        self.observations = 0.0


def _shifted(known: np.ndarray, tries: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Chances with their odds times the one factor that explains the hits best."""
    possible = (known > 0) & (known < 1)
    if not tries[possible].any():
        return known
    odds, tried = np.log(known[possible] / (1 - known[possible])), tries[possible]
    right, shift = hits[possible].sum(), 0.0
    for _ in range(20):
        # Newton's method on a concave likelihood, each step bounded.
        chance = 1 / (1 + np.exp(-odds - shift))
        slope = (tried * chance * (1 - chance)).sum() + 1 / _SHIFT**2
        change = (right - (tried * chance).sum() - shift / _SHIFT**2) / slope
        shift += float(np.clip(change, -1, 1))
        if abs(change) < 1e-6:
            break
    found = known.copy()
    found[possible] = 1 / (1 + np.exp(-odds - shift))
    return found


def _bounded(rates: np.ndarray) -> np.ndarray:
    """Ranks observed at different times may sum to a little over one."""
    return rates / np.maximum(rates.sum(axis=-1, keepdims=True), 1)
