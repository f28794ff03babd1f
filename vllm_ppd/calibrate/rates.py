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
from dataclasses import dataclass, fields, replace

import numpy as np

from vllm_ppd.search.acceptance import BEYOND, AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS
from vllm_ppd.trees.tree import SparseTree

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


@dataclass(frozen=True, eq=False)
class StepPoints:
    """N roots in texts, m prompt tokens, K ranks. Points of a run are neighbours.

    Attributes:
        text: [N] number of the text.
        root: [N] position of the root in it.
        fresh: [N] whether that is where decoding begins.
        match_class: [N] of the root.
        next_class: [N, A] of the next step's root, if the step has 1, 2, ... A tokens.
        right: [N] tokens of the n-gram draft that are right.
        tried: [N] those, and the wrong one after them if there is one.
        prompted: [N, m] rank of the true token by each prompt token; K without one.
        beside: [N, m] the same without the n-gram draft's wrong token; K at other
            depths.
        unprompted: [N] rank of the next token in the bigram table's list of the root.
        beside_unprompted: [N] rank of the token after the n-gram draft's right ones in
            the last one's list, the wrong token left out.

    Until one of W weights of the bigram table is chosen, `prompted` and `beside` are
    [W, N, m].
    """

    text: np.ndarray
    root: np.ndarray
    fresh: np.ndarray
    match_class: np.ndarray
    next_class: np.ndarray
    right: np.ndarray
    tried: np.ndarray
    prompted: np.ndarray
    beside: np.ndarray
    unprompted: np.ndarray
    beside_unprompted: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[StepPoints]) -> StepPoints:
        """All of them with W weights, in the order of texts and positions."""
        text = np.concatenate([part.text for part in parts])
        order = np.lexsort((np.concatenate([part.root for part in parts]), text))

        def all_of(name: str) -> np.ndarray:
            values = [getattr(part, name) for part in parts]
            axis = int(name in ("prompted", "beside"))
            return np.concatenate(values, axis).take(order, axis)

        return cls(**{field.name: all_of(field.name) for field in fields(cls)})

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompted.shape[-1]

    @property
    def left(self) -> np.ndarray:
        """[N] points of the same run from each one on, itself included."""
        apart = (np.diff(self.text) != 0) | (np.diff(self.root) != 1)
        ends = np.append(np.flatnonzero(apart) + 1, len(self.root))
        index = np.arange(len(self.root))
        return ends[np.searchsorted(ends, index, side="right")] - index

    def with_weights(self, best: Sequence[int]) -> StepPoints:
        """The points with one weight for each prompt token, by index."""
        where = list(best), slice(None), range(len(best))
        return replace(
            self, prompted=self.prompted[where].T, beside=self.beside[where].T
        )

    def without_ngrams(self) -> StepPoints:
        """The same where n-gram matches are not looked up."""
        nothing = np.zeros_like(self.right)
        return replace(self, match_class=nothing, right=nothing, tried=nothing)


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


def settled_acceptance(
    points: StepPoints, num_ranks: int, num_ept: int
) -> tuple[AcceptanceModel, tuple[int, ...]]:
    """Acceptance probabilities where steps of the best trees begin, and [m] the best
    bigram weights, by index.

    Args:
        points: with W weights.
        num_ranks: K.
        num_ept: rows per prompt token.
    """
    best = _best_weights(points, np.ones(len(points.root)), num_ranks)
    chosen = points.with_weights(best)
    steps = without = Steps.everywhere(chosen)
    model = _counted(chosen, steps, without, num_ranks)
    for _ in range(_ROUNDS):
        plain = _walks(chosen.without_ngrams(), model.without_ngram(), num_ept)
        best = _best_weights(points, plain.begins.sum(axis=(0, 2)), num_ranks)
        chosen = points.with_weights(best)
        steps = _walks(chosen, model, num_ept)
        model = _counted(chosen, steps, plain, num_ranks)
    return model, best


def _walks(points: StepPoints, model: AcceptanceModel, num_ept: int) -> Steps:
    """Steps of the best policies at all row prices."""
    walks = []
    for price in ROW_PRICES:
        curve = LatencyCurve.linear(1.0, price)
        policy = best_policy(model, curve, _MAX_ROWS, num_ept)
        walks.append(walk_steps(points, policy.trees, model.prompted.shape[1]))
    begins, advances = zip(*walks, strict=True)
    return Steps(np.stack(begins), np.stack(advances))


def _best_weights(
    points: StepPoints, weight: np.ndarray, num_ranks: int
) -> tuple[int, ...]:
    """[m] by how often the truth is among the first few of all points."""
    hits = (points.prompted < min(_CHOSEN_BY, num_ranks)) * weight[:, None]
    return tuple(hits.sum(axis=1).argmax(axis=0).tolist())


def _counted(
    points: StepPoints, steps: Steps, without: Steps, num_ranks: int
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
        transitions=_transitions(points, steps),
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


def _transitions(points: StepPoints, steps: Steps) -> np.ndarray:
    """[2, C + 1, C + 1] of match classes, after steps that accepted nothing or more."""
    counts = np.full((2, len(LENGTHS) + 1, len(LENGTHS) + 1), 1e-3)

    def count(at: np.ndarray, begins: np.ndarray, advance: np.ndarray) -> None:
        then = points.next_class[at, advance - 1]
        where = (advance > 1).astype(int), points.match_class[at], then
        np.add.at(counts, where, begins)

    where = np.nonzero(steps.begins)
    count(where[1], steps.begins[where], steps.advances[where])
    elsewhere = _ELSEWHERE * steps.begins.sum(axis=(0, 2))
    count(np.arange(len(elsewhere)), elsewhere, _medium_advances(points))
    return counts / counts.sum(axis=2, keepdims=True)


def _medium_advances(points: StepPoints) -> np.ndarray:
    """[N] tokens of steps that try the whole n-gram draft, or a medium tree."""
    widths = np.ones(points.num_prompt_tokens, dtype=int)
    widths[: len(_WIDTHS)] = _WIDTHS[: len(widths)]
    accepted = (points.prompted < widths).cumprod(axis=1).sum(axis=1)
    return 1 + np.where(points.right > 0, points.right, accepted)


def _rates(ranks: np.ndarray, weights: np.ndarray, num_ranks: int) -> np.ndarray:
    """[K] share of each rank; what is in no list has rank K."""
    counts = np.bincount(ranks, weights, num_ranks + 1)
    return counts[:-1] / max(float(counts.sum()), _NEVER)


def max_advance(num_prompt_tokens: int) -> int:
    """Most tokens of a step, whatever its tree."""
    return 1 + max(num_prompt_tokens + BEYOND, MAX_NGRAM_DRAFTS)


def walk_steps(
    points: StepPoints, trees: Sequence[Sequence[SparseTree]], num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """`begins` and `advances` of one policy's steps, walked from where decoding begins.
    In a run that does not begin there they are the mean of walks from each of its first
    points, which are not counted themselves.

    trees: [C + 1][m + 1] by match class and num_prompted.
    num_ranks: K.
    """
    children = [[_children(tree) for tree in row] for row in trees]
    count, values = len(points.root), points.num_prompt_tokens + 1
    begins = np.zeros((count, values))
    advances = np.zeros((count, values), dtype=np.int64)
    left = points.left
    ranks = _true_ranks(points, num_ranks).tolist()
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
            for rank in ranks[at][num_prompted]:
                child = below.get((node, rank))
                if child is None:
                    break
                node, depth = child, depth + 1
            advances[at, num_prompted] = depth + 1
            if depth + 1 < left[at]:
                then = trees[match_class][num_prompted].prompts[node]
                begins[at + depth + 1, then] += begins[at, num_prompted]
    begins[burning] = 0
    return begins, advances


def _children(tree: SparseTree) -> dict[tuple[int, int], int]:
    """(parent, rank) -> node."""
    places = zip(tree.parents, tree.ranks, strict=True)
    return {place: node for node, place in enumerate(places, 1)}


def _true_ranks(points: StepPoints, num_ranks: int) -> np.ndarray:
    """[N, m + 1, D] rank, as a tree counts them, of the true token at each depth below
    the root, by num_prompted; -1 where no draft token is it, or the texts do not tell.
    """
    count, m = points.prompted.shape
    depth = np.arange(max_advance(m) - 1)
    at = np.arange(count)[:, None] + depth
    known = depth < points.left[:, None]
    unprompted = np.where(known, points.unprompted[at % count], num_ranks)
    has_row = depth[:m] < np.arange(m + 1)[:, None]  # [m + 1, m]

    def by_num_prompted(without: np.ndarray, prompted: np.ndarray) -> np.ndarray:
        ranks = np.repeat(without[:, None], m + 1, axis=1)
        ranks[..., :m] = np.where(has_row, prompted[:, None], ranks[..., :m])
        return ranks

    ranks = by_num_prompted(unprompted, points.prompted)
    ranks[ranks == num_ranks] = -1
    # The n-gram draft's own token is rank 0, and the others count from 1.
    last = np.repeat(points.beside_unprompted[:, None], len(depth), axis=1)
    beside = 1 + by_num_prompted(last, points.beside)
    beside[beside > num_ranks] = -1
    right = points.right[:, None, None]
    matched = (points.match_class > 0)[:, None, None]
    ranks = np.where(matched & (depth == right), beside, ranks)
    return np.where(matched & (depth < right), 0, ranks)
