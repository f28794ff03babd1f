"""Acceptance probabilities where decoding steps begin, from insertion points in text.

A step that accepts draft tokens skips them, and the next step begins after a rejected
one. Passages that are easy to predict therefore hold fewer steps than tokens. Rates
over all tokens promise a longer acceptance length than decoding reaches; rates over the
tokens where a policy's steps begin do not.

Where steps begin depends on the trees, and the best trees on the probabilities. So the
rates are counted over all tokens first, then where steps of the best trees begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vllm_ppd.search.acceptance import BEYOND, AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS
from vllm_ppd.trees.tree import SparseTree

__all__ = [
    "StepPoints",
    "Steps",
    "Texts",
    "WeightedPoints",
    "accepted_drafts",
    "settled_acceptance",
    "walk_steps",
]

# Trees are those of a tree menu at these row prices: small, medium and large ones.
ROW_PRICES = (0.2, 0.05, 0.01)
# Rounds of trees and counts after the first count, and most rows of those trees.
_ROUNDS, _MAX_ROWS = 3, 64
# The bigram weight is chosen by how often the truth is among so many children.
_CHOSEN_BY = 4
# Probabilities that no step of the trees puts to the test are needed all the same. So
# steps with other prompt rows count, too, by so much; and so do transitions of steps
# with a medium tree.
_ELSEWHERE = 0.02
# Less than any weight of a point.
_NEVER = 1e-9
# Draft tokens of a medium tree at each depth.
_WIDTHS = (4, 2, 1)
# Walks begin at so many points, and have forgotten where once they are past these.
_BURN_IN = 8


class Texts:
    """Match classes of all texts, numbered as they are added.

    beyond: tokens at a text's end that are the root of no point.
    """

    def __init__(self, beyond: int) -> None:
        self._beyond = beyond
        self._classes: list[np.ndarray] = []
        self._bounds: list[np.ndarray] = []
        self._count = self._size = 0

    def add(self, match_class: np.ndarray, first: np.ndarray, end: np.ndarray) -> int:
        """Add texts [B, L], written from `first` [B] on to before `end`; returns the
        number of the first one."""
        number, (batch, length) = self._count, match_class.shape
        offset = self._size + length * np.arange(batch)
        self._classes.append(match_class.ravel())
        self._bounds.append(np.stack([offset, first, end]))
        self._count += batch
        self._size += match_class.size
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
class StepPoints:
    """N roots in texts, m prompt tokens, K ranks. Points of a run are neighbours.

    Attributes:
        text: [N] number of the text.
        root: [N] position of the root in it.
        fresh: [N] whether that is where decoding begins.
        match_class: [N] of the root.
        right: [N] tokens of the n-gram draft that are right.
        tried: [N] those, and the wrong one after them if there is one.
        prompted: [N, m] rank of the true token by each prompt token; K without one.
        beside: [N, m] the same without the n-gram draft's wrong token; K at other
            depths.
        unprompted: [N] rank of the next token in the bigram table's list of the root.
        beside_unprompted: [N] rank of the token after the n-gram draft's right ones in
            the last one's list, the wrong token left out.
    """

    text: np.ndarray
    root: np.ndarray
    fresh: np.ndarray
    match_class: np.ndarray
    right: np.ndarray
    tried: np.ndarray
    prompted: np.ndarray
    beside: np.ndarray
    unprompted: np.ndarray
    beside_unprompted: np.ndarray

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompted.shape[1]

    @property
    def left(self) -> np.ndarray:
        """[N] points of the same run from each one on, itself included."""
        apart = (np.diff(self.text) != 0) | (np.diff(self.root) != 1)
        ends = np.append(np.flatnonzero(apart) + 1, len(self.root))
        index = np.arange(len(self.root))
        return ends[np.searchsorted(ends, index, side="right")] - index

    def without_ngrams(self) -> StepPoints:
        """The same where n-gram matches are not looked up."""
        nothing = np.zeros_like(self.right)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values.update(match_class=nothing, right=nothing, tried=nothing)
        return StepPoints(**values)


@dataclass(frozen=True, eq=False)
class WeightedPoints(StepPoints):
    """Points whose ranks were taken with W weights of the bigram table.

    prompted, beside: [W, N, m].
    """

    @classmethod
    def joined(cls, parts: Sequence[WeightedPoints]) -> WeightedPoints:
        """All of them, in the order of texts and positions."""
        text = np.concatenate([part.text for part in parts])
        order = np.lexsort((np.concatenate([part.root for part in parts]), text))

        def all_of(name: str) -> np.ndarray:
            values = [getattr(part, name) for part in parts]
            axis = int(name in ("prompted", "beside"))
            return np.concatenate(values, axis).take(order, axis)

        return cls(**{field.name: all_of(field.name) for field in fields(cls)})

    def with_weights(self, best: Sequence[int]) -> StepPoints:
        """The points with one weight for each prompt token, by index."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("prompted", "beside"):
            values[name] = values[name][list(best), :, range(len(best))].T
        return StepPoints(**values)


@dataclass(frozen=True, eq=False)
class Steps:
    """How often steps of P policies begin at each point, and how far they go.

    Attributes:
        begins: [P, N, m + 1] by num_prompted.
        advances: [P, N, m + 1] tokens of such a step; 0 where none begins.
    """

    begins: np.ndarray
    advances: np.ndarray

    @classmethod
    def everywhere(cls, points: StepPoints) -> Steps:
        """A plain step from every token, with all prompt rows and without any."""
        shape = 1, len(points.root), points.num_prompt_tokens + 1
        begins = np.zeros(shape)
        begins[..., [0, -1]] = 1.0
        return cls(begins, np.ones(shape, dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Steps]) -> Steps:
        """The steps of all policies."""
        return cls(
            np.concatenate([part.begins for part in parts]),
            np.concatenate([part.advances for part in parts]),
        )


def settled_acceptance(
    points: WeightedPoints, texts: Texts, num_ranks: int, num_ept: int
) -> tuple[AcceptanceModel, tuple[int, ...]]:
    """Acceptance probabilities where steps of the best trees begin, and [m] the best
    bigram weights, by index.

    Args:
        points, texts: the counts.
        num_ranks: K.
        num_ept: rows per prompt token.
    """
    best = _best_weights(points, np.ones(len(points.root)), num_ranks)
    chosen = points.with_weights(best)
    steps = without = Steps.everywhere(chosen)
    model = _counted(chosen, steps, without, texts, num_ranks)
    for _ in range(_ROUNDS):
        plain = _walks(chosen.without_ngrams(), model.without_ngram(), num_ept)
        best = _best_weights(points, plain.begins.sum(axis=(0, 2)), num_ranks)
        chosen = points.with_weights(best)
        steps = _walks(chosen, model, num_ept)
        model = _counted(chosen, steps, plain, texts, num_ranks)
    return model, best


def _walks(points: StepPoints, model: AcceptanceModel, num_ept: int) -> Steps:
    """Steps of the best policies at all row prices."""
    walks = []
    for price in ROW_PRICES:
        curve = LatencyCurve.linear(1.0, price)
        policy = best_policy(model, curve, _MAX_ROWS, num_ept)
        walks.append(walk_steps(points, policy.trees, model.prompted.shape[1]))
    return Steps.joined(walks)


def _best_weights(
    points: WeightedPoints, weight: np.ndarray, num_ranks: int
) -> tuple[int, ...]:
    """[m] by how often the truth is among the first few of all points."""
    hits = (points.prompted < min(_CHOSEN_BY, num_ranks)) * weight[:, None]
    return tuple(hits.sum(axis=1).argmax(axis=0).tolist())


def _counted(
    points: StepPoints, steps: Steps, without: Steps, texts: Texts, num_ranks: int
) -> AcceptanceModel:
    """Rates, weighted by steps; `without` are those without n-gram matches."""
    m, classes = points.num_prompt_tokens, points.match_class
    prompted, unprompted = _rates_where(points, steps, classes == 0, num_ranks)
    everywhere = np.ones(len(classes), dtype=bool)
    overall = _rates_where(points, without, everywhere, num_ranks)
    if not prompted.any():
        prompted, unprompted = overall
    by_prompted = steps.begins.sum(axis=0)
    begins_at = by_prompted.sum(axis=1)
    ngram = np.zeros((len(LENGTHS), MAX_NGRAM_DRAFTS))
    beside = np.zeros((len(LENGTHS), m, num_ranks))
    for index in range(len(LENGTHS)):
        here = classes == index + 1
        depth, begins = np.arange(MAX_NGRAM_DRAFTS), begins_at[here, None]
        hits = (begins * (points.right[here, None] > depth)).sum(axis=0)
        tries = (begins * (points.tried[here, None] > depth)).sum(axis=0)
        ngram[index] = hits / np.maximum(tries, _NEVER)
        for distance in range(m):
            failed = here & (points.right == distance) & (points.tried > distance)
            # Steps that have this prompt token's row.
            weight = by_prompted[:, distance + 1 :].sum(axis=1) + _ELSEWHERE * begins_at
            beside[index, distance] = _rates(
                points.beside[failed, distance], weight[failed], num_ranks
            )
    return AcceptanceModel(
        prompted=prompted,
        unprompted=unprompted,
        ngram=ngram,
        beside=beside,
        transitions=_transitions(points, steps, texts),
        overall=np.concatenate([overall[0], overall[1][None]]),
        # Over all positions, which the measurement knows.
        marginal=np.zeros((m, num_ranks)),
    )


def _rates_where(
    points: StepPoints, steps: Steps, here: np.ndarray, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """[m, K] of prompt tokens, and [K] of the bigram table alone, over steps from the
    points `here` that come as far, with the prompt token's row or without."""
    m, reached = points.num_prompt_tokens, _medium_advances(points)
    prompted = np.zeros((m, num_ranks))
    unprompted = np.zeros(num_ranks + 1)
    elsewhere = _ELSEWHERE * steps.begins.sum(axis=(0, 2))
    for depth in range(m + BEYOND):
        begins = (steps.begins * (steps.advances > depth)).sum(axis=0)
        if depth < m:
            weight = begins[:, depth + 1 :].sum(axis=1) + elsewhere * (reached > depth)
            rank = points.prompted[here, depth]
            prompted[depth] = _rates(rank, weight[here], num_ranks)
        weight = begins[:, : depth + 1].sum(axis=1) + elsewhere * (depth == 0)
        index = np.flatnonzero(here & (points.left > depth))
        unprompted += np.bincount(
            points.unprompted[index + depth], weight[index], num_ranks + 1
        )
    return prompted, unprompted[:-1] / max(float(unprompted.sum()), _NEVER)


def _transitions(points: StepPoints, steps: Steps, texts: Texts) -> np.ndarray:
    """[2, C + 1, C + 1] of match classes, after steps that accepted nothing or more."""
    counts = np.full((2, len(LENGTHS) + 1, len(LENGTHS) + 1), 1e-3)

    def count(at: np.ndarray, begins: np.ndarray, advance: np.ndarray) -> None:
        then = texts.after(points.text[at], points.root[at], advance)
        where = (advance > 1).astype(int), points.match_class[at], then
        np.add.at(counts, where, begins)

    where = np.nonzero(steps.begins)
    count(where[1], steps.begins[where], steps.advances[where])
    elsewhere = _ELSEWHERE * steps.begins.sum(axis=(0, 2))
    count(np.arange(len(elsewhere)), elsewhere, _medium_advances(points))
    return counts / counts.sum(axis=2, keepdims=True)


def accepted_drafts(ranks: np.ndarray) -> np.ndarray:
    """[n] draft tokens of a medium tree that would be accepted.

    ranks: [n, m] rank of the true token by each prompt token.
    """
    widths = np.ones(ranks.shape[1], dtype=int)
    widths[: len(_WIDTHS)] = _WIDTHS[: len(widths)]
    return (ranks < widths).cumprod(axis=1).sum(axis=1)


def _medium_advances(points: StepPoints) -> np.ndarray:
    """[N] tokens of steps that try the whole n-gram draft, or a medium tree."""
    accepted = accepted_drafts(points.prompted)
    return 1 + np.where(points.right > 0, points.right, accepted)


def _rates(ranks: np.ndarray, weights: np.ndarray, num_ranks: int) -> np.ndarray:
    """[K] share of each rank; what is in no list has rank K."""
    counts = np.bincount(ranks, weights, num_ranks + 1)
    return counts[:-1] / max(float(counts.sum()), _NEVER)


def walk_steps(
    points: StepPoints, trees: Sequence[Sequence[SparseTree]], num_ranks: int
) -> Steps:
    """Steps of one policy, walked from where decoding begins. In a run that does not
    begin there they are the mean of walks from each of its first points, which are not
    counted themselves.

    trees: [C + 1][m + 1] by match class and num_prompted.
    num_ranks: K.
    """
    children = [[_children(tree) for tree in row] for row in trees]
    count, values = len(points.root), points.num_prompt_tokens + 1
    begins = np.zeros((count, values))
    advances = np.zeros((count, values), dtype=np.int64)
    left = points.left
    lists = _TrueRanks(points, num_ranks, left.tolist())
    burning = np.zeros(count, dtype=bool)
    for at in range(count):
        if points.fresh[at]:
            begins[at, 0] = 1.0
        elif at == 0 or left[at - 1] == 1:
            burn_in = max(1, min(_BURN_IN, int(left[at]) // 2))
            begins[at : at + burn_in, 0] += 1 / burn_in
            burning[at : at + burn_in] = left[at] > 1
        match_class = int(points.match_class[at])
        for num_prompted in np.flatnonzero(begins[at]).tolist():
            node, depth = 0, 0
            below = children[match_class][num_prompted]
            while (rank := lists.rank(at, depth, num_prompted)) is not None:
                child = below.get((node, rank))
                if child is None:
                    break
                node, depth = child, depth + 1
            advances[at, num_prompted] = depth + 1
            if depth + 1 < left[at]:
                then = trees[match_class][num_prompted].prompts[node]
                begins[at + depth + 1, then] += begins[at, num_prompted]
    begins[burning] = 0
    return Steps(begins[None], advances[None])


def _children(tree: SparseTree) -> dict[tuple[int, int], int]:
    """(parent, rank) -> node."""
    places = zip(tree.parents, tree.ranks, strict=True)
    return {place: node for node, place in enumerate(places, 1)}


class _TrueRanks:
    """Ranks of the true tokens below the nodes of a true path."""

    def __init__(self, points: StepPoints, num_ranks: int, left: list[int]):
        self._num_ranks, self._left = num_ranks, left
        self._matched = (points.match_class > 0).tolist()
        self._right = points.right.tolist()
        self._prompted, self._beside = points.prompted.tolist(), points.beside.tolist()
        self._unprompted = points.unprompted.tolist()
        self._beside_unprompted = points.beside_unprompted.tolist()

    def rank(self, at: int, depth: int, num_prompted: int) -> int | None:
        """Of the true token `depth` tokens after the root's next one, as a tree counts
        ranks; None where no draft token is it, or the texts do not tell."""
        right = self._right[at]
        if self._matched[at] and depth < right:
            return 0
        first = 0
        if self._matched[at] and depth == right:
            # The n-gram draft's own token is rank 0.
            first = 1
            rank = self._beside_unprompted[at]
            if depth < num_prompted:
                rank = self._beside[at][depth]
        elif depth < num_prompted:
            rank = self._prompted[at][depth]
        elif depth < self._left[at]:
            rank = self._unprompted[at + depth]
        else:
            return None
        return first + rank if rank < self._num_ranks else None
