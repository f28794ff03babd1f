"""Places in known text at which steps may begin, and steps that go from one to another.

A step that guesses well skips what it guessed, and the next one begins behind a guess
that failed. Passages that are easy to guess therefore hold fewer steps than tokens, and
steps begin where the text has just been hard to guess. Rates over all tokens promise
more tokens per step than decoding gets; rates over the tokens at which the steps of a
policy begin do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vllm_ppd.trees.tree import SparseTree

__all__ = ["StepPoints", "Steps", "accepted_guesses", "walk_steps"]

# Candidates that a middling tree has at each depth.
_WIDTHS = (4, 2, 1)
# Walks begin at so many places, and have forgotten where once they are past these.
_BURN_IN = 8


@dataclass(frozen=True, eq=False)
class StepPoints:
    """N roots in texts, m prompt tokens, K ranks. Points of a run are neighbours.

    Attributes:
        text: [N] number of the text.
        root: [N] position of the root in it.
        fresh: [N] whether that is where decoding begins.
        match_class: [N] of the root.
        right: [N] tokens of the match's chain that are right.
        tried: [N] those, and the wrong one after them if there is one.
        prompted: [N, m] place of the true token among each prompt token's candidates,
            K where it is not there.
        beside: [N, m] the same without the chain's wrong token; K at other depths.
        alone: [N] place of the next token among the root's bigram.
        beside_alone: [N] place of the token after the chain's right ones among the
            last one's bigram, the chain's wrong token left out.
    """

    text: np.ndarray
    root: np.ndarray
    fresh: np.ndarray
    match_class: np.ndarray
    right: np.ndarray
    tried: np.ndarray
    prompted: np.ndarray
    beside: np.ndarray
    alone: np.ndarray
    beside_alone: np.ndarray

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

    def without_matches(self) -> StepPoints:
        """The same where matches are not looked for."""
        nothing = np.zeros_like(self.right)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values.update(match_class=nothing, right=nothing, tried=nothing)
        return StepPoints(**values)


def accepted_guesses(ranks: np.ndarray) -> np.ndarray:
    """[n] tokens that a middling tree would guess right.

    ranks: [n, m] place of the true token among each prompt token's candidates.
    """
    widths = np.ones(ranks.shape[1], dtype=int)
    widths[: len(_WIDTHS)] = _WIDTHS[: len(widths)]
    return (ranks < widths).cumprod(axis=1).sum(axis=1)


@dataclass(frozen=True, eq=False)
class Steps:
    """How often steps of a policy begin at each point, and where they go.

    Attributes:
        begins: [N, m + 1] by the prompt tokens at hand.
        advances: [N, m + 1] tokens of such a step; 0 where none begins.
    """

    begins: np.ndarray
    advances: np.ndarray


def walk_steps(
    points: StepPoints, trees: Sequence[Sequence[SparseTree]], num_ranks: int
) -> Steps:
    """Walks from where decoding begins, or, in a run that does not begin there, the
    mean of walks from each of its first points, which are not counted themselves.

    trees: [C + 1][m + 1] by match class and state.
    num_ranks: K.
    """
    children = [[_children(tree) for tree in row] for row in trees]
    count, states = len(points.root), points.num_prompt_tokens + 1
    begins = np.zeros((count, states))
    advances = np.zeros((count, states), dtype=np.int64)
    left = points.left
    lists = _Lists(points, num_ranks, left.tolist())
    burning = np.zeros(count, dtype=bool)
    for at in range(count):
        if points.fresh[at]:
            begins[at, 0] = 1.0
        elif at == 0 or left[at - 1] == 1:
            burn_in = max(1, min(_BURN_IN, int(left[at]) // 2))
            begins[at : at + burn_in, 0] += 1 / burn_in
            burning[at : at + burn_in] = left[at] > 1
        match_class = int(points.match_class[at])
        for state in np.flatnonzero(begins[at]).tolist():
            node, depth = 0, 0
            below = children[match_class][state]
            while (at_rank := lists.rank(at, depth, state)) is not None:
                child = below.get((node, at_rank))
                if child is None:
                    break
                node, depth = child, depth + 1
            advances[at, state] = depth + 1
            if depth + 1 < left[at]:
                then = trees[match_class][state].prompts[node]
                begins[at + depth + 1, then] += begins[at, state]
    begins[burning] = 0
    return Steps(begins, advances)


class _Lists:
    """The true tokens' ranks below the nodes of a true path."""

    def __init__(self, points: StepPoints, num_ranks: int, left: list[int]):
        self._none, self._left = num_ranks, left
        self._matched = (points.match_class > 0).tolist()
        self._right = points.right.tolist()
        self._prompted, self._beside = points.prompted.tolist(), points.beside.tolist()
        self._alone = points.alone.tolist()
        self._beside_alone = points.beside_alone.tolist()

    def rank(self, at: int, depth: int, state: int) -> int | None:
        """Of the true token `depth` tokens after the root's next one, as a tree counts
        ranks; None where no candidate is it, or nothing is known of it."""
        right = self._right[at]
        if self._matched[at] and depth < right:
            return 0
        first = 0
        if self._matched[at] and depth == right:
            # The chain's own token is rank 0.
            first = 1
            place = self._beside[at][depth] if depth < state else self._beside_alone[at]
        elif depth < state:
            place = self._prompted[at][depth]
        elif depth < self._left[at]:
            place = self._alone[at + depth]
        else:
            return None
        return first + place if place < self._none else None


def _children(tree: SparseTree) -> dict[tuple[int, int], int]:
    """(parent, rank) -> node."""
    places = zip(tree.parents, tree.ranks, strict=True)
    return {place: node for node, place in enumerate(places, 1)}
