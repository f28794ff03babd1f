"""Chances of candidates from places in known text, each weighted by how often a step
begins there.

Where steps begin depends on the trees, and the best trees on the chances. So chances
are counted over all tokens first, then where the steps of the trees begin that are best
by those, and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vllm_ppd.calibrate.step_points import (
    StepPoints,
    Steps,
    accepted_guesses,
    walk_steps,
)
from vllm_ppd.search.acceptance import BEYOND, AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS

__all__ = ["Texts", "TriedPoints", "settled_evidence"]

# Rounds of trees and counts after the first count, and most rows of those trees.
_ROUNDS, _MAX_ROWS = 3, 64
# The weight is chosen by how often the truth is among so many children.
_CHOSEN_BY = 4
# Chances that no step of the trees puts to the test are asked for all the same. So
# steps that have other guesses at hand count, too, by so much; and so do moves of steps
# with a middling tree.
_ELSEWHERE = 0.02
# Less than any weight of a point.
_NEVER = 1e-9


class Texts:
    """Match classes of texts, number after number.

    beyond: tokens at a text's end that are the root of no point.
    """

    def __init__(self, beyond: int) -> None:
        self._beyond = beyond
        self._classes: list[np.ndarray] = []
        self._bounds: list[np.ndarray] = []
        self._count = self._size = 0

    def add(self, class_at: np.ndarray, first: np.ndarray, end: np.ndarray) -> int:
        """Some texts [B, L], written from `first` [B] on to before `end`; returns the
        number of the first one."""
        number, (batch, length) = self._count, class_at.shape
        offset = self._size + length * np.arange(batch)
        self._classes.append(class_at.ravel())
        self._bounds.append(np.stack([offset, first, end]))
        self._count += batch
        self._size += class_at.size
        return number

    def after(
        self, text: np.ndarray, root: np.ndarray, advance: np.ndarray
    ) -> np.ndarray:
        """[N] match class of the step after one. After the end of a text another one
        begins, where matches are rare."""
        classes = np.concatenate(self._classes)
        offset, first, end = np.concatenate(self._bounds, axis=1)[:, text]
        then = root + advance
        return classes[offset + np.where(then < end - self._beyond, then, first)]


@dataclass(frozen=True, eq=False)
class TriedPoints(StepPoints):
    """Points whose lists were made with W weights of the bigram table.

    prompted, beside: [W, N, m].
    """

    @classmethod
    def joined(cls, parts: Sequence[TriedPoints]) -> TriedPoints:
        """All of them, runs in one piece that came in several."""
        text = np.concatenate([part.text for part in parts])
        order = np.lexsort((np.concatenate([part.root for part in parts]), text))

        def all_of(name: str) -> np.ndarray:
            values = [getattr(part, name) for part in parts]
            axis = int(name in ("prompted", "beside"))
            return np.concatenate(values, axis).take(order, axis)

        return cls(**{field.name: all_of(field.name) for field in fields(cls)})

    def with_weights(self, best: Sequence[int]) -> StepPoints:
        """The points as the weight of each prompt token has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("prompted", "beside"):
            values[name] = values[name][list(best), :, range(len(best))].T
        return StepPoints(**values)


def settled_evidence(
    points: TriedPoints,
    texts: Texts,
    num_ranks: int,
    latency: LatencyCurve,
    num_ept: int,
) -> tuple[AcceptanceModel, tuple[int, ...]]:
    """Rates where steps of the best trees begin; and [m] the best weights, by index.

    Args:
        points, texts: what is known.
        num_ranks: K.
        latency: seconds of a step, by which trees are chosen.
        num_ept: rows per prompt token.
    """
    everywhere = np.ones(len(points.root))
    best = _best_weights(points, everywhere, num_ranks)
    known = points.with_weights(best)
    steps = without = _from_everywhere(known)
    acceptance = _counted(known, steps, without, texts, num_ranks)
    for _ in range(_ROUNDS):
        policy = best_policy(acceptance, latency, _MAX_ROWS, num_ept)
        alone = best_policy(acceptance.without_chains(), latency, _MAX_ROWS, num_ept)
        without = walk_steps(known.without_matches(), alone.trees, num_ranks)
        best = _best_weights(points, without.begins.sum(axis=1), num_ranks)
        known = points.with_weights(best)
        steps = walk_steps(known, policy.trees, num_ranks)
        acceptance = _counted(known, steps, without, texts, num_ranks)
    return acceptance, best


def _from_everywhere(points: StepPoints) -> Steps:
    """A plain step from every token, with all guesses at hand and with none."""
    shape = len(points.root), points.num_prompt_tokens + 1
    begins = np.zeros(shape)
    begins[:, [0, -1]] = 1.0
    return Steps(begins, np.ones(shape, dtype=np.int64))


def _best_weights(
    points: TriedPoints, weight: np.ndarray, num_ranks: int
) -> tuple[int, ...]:
    """[m] by how often the truth is among the first few of all points."""
    found = (points.prompted < min(_CHOSEN_BY, num_ranks)) * weight[:, None]
    return tuple(found.sum(axis=1).argmax(axis=0).tolist())


def _counted(
    points: StepPoints, steps: Steps, without: Steps, texts: Texts, num_ranks: int
) -> AcceptanceModel:
    """Rates, weighted by steps; `without` are those without matches."""
    m, classes = points.num_prompt_tokens, points.match_class
    plain, alone = _rates_where(points, steps, classes == 0, num_ranks)
    everywhere = np.ones(len(classes), dtype=bool)
    overall = _rates_where(points, without, everywhere, num_ranks)
    if not plain.any():
        plain, alone = overall
    all_begins = steps.begins.sum(axis=1)
    chain = np.zeros((len(LENGTHS), MAX_NGRAM_DRAFTS))
    beside = np.zeros((len(LENGTHS), m, num_ranks))
    for index in range(len(LENGTHS)):
        here = classes == index + 1
        depth, begins = np.arange(MAX_NGRAM_DRAFTS), all_begins[here, None]
        hits = (begins * (points.right[here, None] > depth)).sum(axis=0)
        tries = (begins * (points.tried[here, None] > depth)).sum(axis=0)
        chain[index] = hits / np.maximum(tries, _NEVER)
        for distance in range(m):
            failed = here & (points.right == distance) & (points.tried > distance)
            beside[index, distance] = _rates(
                points.beside[failed, distance],
                _beside(steps, distance)[failed],
                num_ranks,
            )
    return AcceptanceModel(
        prompted=plain,
        unprompted=alone,
        chain=chain,
        beside=beside,
        moves=_moves(points, steps, texts),
        overall=np.concatenate([overall[0], overall[1][None]]),
    )


def _rates_where(
    points: StepPoints, steps: Steps, here: np.ndarray, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """[m, K] of prompt tokens, and [K] of the table alone, over steps from some of the
    points: those that come as far, with a guess of the prompt token or without."""
    m, reached = points.num_prompt_tokens, _middling_advances(points)
    prompted = np.zeros((m, num_ranks))
    alone = np.zeros(num_ranks + 1)
    elsewhere = _ELSEWHERE * steps.begins.sum(axis=1)
    for depth in range(m + BEYOND):
        begins = steps.begins * (steps.advances > depth)
        if depth < m:
            weight = begins[:, depth + 1 :].sum(axis=1) + elsewhere * (reached > depth)
            place = points.prompted[here, depth]
            prompted[depth] = _rates(place, weight[here], num_ranks)
        weight = begins[:, : depth + 1].sum(axis=1) + elsewhere * (depth == 0)
        some = np.flatnonzero(here & (points.left > depth))
        alone += np.bincount(points.alone[some + depth], weight[some], num_ranks + 1)
    return prompted, alone[:-1] / max(float(alone.sum()), _NEVER)


def _beside(steps: Steps, distance: int) -> np.ndarray:
    """[N] how often a step begins that has this prompt token's guess at hand."""
    begins = steps.begins
    return begins[:, distance + 1 :].sum(axis=1) + _ELSEWHERE * begins.sum(axis=1)


def _moves(points: StepPoints, steps: Steps, texts: Texts) -> np.ndarray:
    """[2, C + 1, C + 1] of match classes, after steps that accepted nothing or some."""
    moves = np.full((2, len(LENGTHS) + 1, len(LENGTHS) + 1), 1e-3)

    def count(at: np.ndarray, begins: np.ndarray, advance: np.ndarray) -> None:
        then = texts.after(points.text[at], points.root[at], advance)
        where = (advance > 1).astype(int), points.match_class[at], then
        np.add.at(moves, where, begins)

    at, state = np.nonzero(steps.begins)
    count(at, steps.begins[at, state], steps.advances[at, state])
    some = _ELSEWHERE * steps.begins.sum(axis=1)
    count(np.arange(len(some)), some, _middling_advances(points))
    return moves / moves.sum(axis=2, keepdims=True)


def _middling_advances(points: StepPoints) -> np.ndarray:
    """[N] tokens of steps that try the whole chain, or a middling tree."""
    guessed = accepted_guesses(points.prompted)
    return 1 + np.where(points.right > 0, points.right, guessed)


def _rates(places: np.ndarray, weights: np.ndarray, num_ranks: int) -> np.ndarray:
    """[K] share of each place; what is in no list has place K."""
    counts = np.bincount(places, weights, num_ranks + 1)
    return counts[:-1] / max(float(counts.sum()), _NEVER)
