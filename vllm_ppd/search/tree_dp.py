"""The best tree of every match class, state and row count, for given relative values.

The tables of `subtrees`, filled for all trees at once, deepest level first. Below a
node at depth d it makes a difference how far the prompt rows of the state look beyond
it, what the match class is, and whether the node is on the chain of the match. On the
chain, it either has the chain's next token as a child or has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.subtrees import Subtrees
from vllm_ppd.trees.plain_tree import PlainTree, arrange

__all__ = ["Candidates", "TypedTrees", "candidates_by_depth", "most_tokens"]

# A candidate that is hardly ever right is not looked at.
_LEAST_CHANCE = 2e-3


class Candidates(NamedTuple):
    """Chances of what may be below the nodes of one depth, the same whatever h is.

    With C match classes besides none there are G = 1 + 3 C kinds of node: off the chain
    in each class, on it without its next token in each but the first, on it with it;
    and of each kind S sorts, by state.
    """

    first: int
    """The least of the S states: in those before it, guesses are as in this one."""
    chances: np.ndarray
    """[G * S, K] of the ordinary candidates, falling."""
    ranks: np.ndarray
    """[G * S, K] of them, as counted off the chain."""
    chain: np.ndarray
    """[C * S] of the chain's next token."""

    @classmethod
    def of(cls, acceptance: AcceptanceModel, depth: int) -> Candidates:
        """Those at `depth`, from 1."""
        m, k = acceptance.prompted.shape
        first = min(depth - 1, m)

        def chances(on_chain: bool) -> np.ndarray:
            rows = [
                acceptance.chances(state, match_class, depth, on_chain)
                for match_class in range(on_chain, acceptance.num_classes)
                for state in range(first, m + 1)
            ]
            return np.reshape(rows, (-1, k + on_chain))

        on = chances(True)
        chances_off = np.concatenate([chances(False), on[:, 1:], on[:, 1:]])
        chances_off[chances_off < _LEAST_CHANCE] = 0
        ranks = np.argsort(-chances_off, axis=1, kind="stable")
        return cls(
            first,
            np.take_along_axis(chances_off, ranks, axis=1),
            ranks,
            np.where(on[:, 0] < _LEAST_CHANCE, 0, on[:, 0]),
        )


# The searches of a plan, one after the other, share one acceptance.
@lru_cache(maxsize=1)
def candidates_by_depth(acceptance: AcceptanceModel) -> tuple[Candidates, ...]:
    """The candidates at depth 1, 2, ... as deep as any has a chance."""
    deepest = max(acceptance.max_depth(each) for each in range(acceptance.num_classes))
    return tuple(Candidates.of(acceptance, depth) for depth in range(1, deepest + 1))


def most_tokens(
    acceptance: AcceptanceModel, candidates: Sequence[Candidates]
) -> np.ndarray:
    """[C + 1, m + 1] mean tokens of a step if every candidate were in the tree."""
    states, classes = acceptance.num_prompt_tokens + 1, acceptance.num_classes
    off, on = np.ones((classes, states)), np.ones((classes - 1, states))
    for first, chances, _, chain in reversed(candidates):
        any_of = chances.sum(axis=1).reshape(-1, states - first)
        right = chain.reshape(-1, states - first)
        here = np.maximum(np.arange(states), first) - first
        on = 1 + right[:, here] * on + any_of[classes : 2 * classes - 1, here] * off[1:]
        off = 1 + any_of[:classes, here] * off
    return np.concatenate([off[:1], on])


class TypedTrees:
    """The most valuable trees for given h.

    Args:
        candidates: by depth, as deep as the trees may be.
        ahead: [2, C + 1, m + 1] what it is worth, in tokens, that a walk ends at the
            root, or below it, by match class and prompt tokens.
        max_rows: rows of the largest tree, at least 1.
        num_ept: rows per prompt token.
    """

    values: np.ndarray
    """[C + 1, m + 1, max_rows + 1] worth of the best tree with at most that many rows,
    in tokens; minus infinity at 0 rows."""

    def __init__(
        self,
        candidates: Sequence[Candidates],
        ahead: np.ndarray,
        max_rows: int,
        num_ept: int,
    ):
        self._num_ept = num_ept
        self._candidates = candidates[: max_rows - 1]
        self._classes, self._states = ahead.shape[1:]
        self._choices: dict[tuple[int, int, int], tuple[int, list]] = {}
        matches = range(1, self._classes)
        kinds = [*range(self._classes), *matches, *matches]
        # Below the deepest candidates.
        ends = ahead[min(len(self._candidates), 1), kinds]
        nothing = np.full((len(kinds), max_rows + 1), -np.inf)
        level = Subtrees(ends, np.empty((len(kinds), 0)), nothing, num_ept)
        self._levels = [level]
        first = self._states - 1
        for depth in range(len(self._candidates) - 1, -1, -1):
            off, on = self._by_state(level.values, first)
            first, chances, _, chain = self._candidates[depth]
            ends = np.repeat(ahead[min(depth, 1), kinds], self._states - first, axis=0)
            below = off[kinds, first:].reshape(-1, max_rows + 1)
            held = chain, on[:, first:].reshape(-1, max_rows + 1)
            level = Subtrees(ends, chances, below, num_ept, held)
            self._levels.insert(0, level)
        off, on = self._by_state(level.values, first)
        self.values = np.concatenate([off[:1], on])

    def _by_state(
        self, values: np.ndarray, first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[C + 1, m + 1, n + 1] off and [C, m + 1, n + 1] on the chain."""
        values = values.reshape(-1, self._states - first, values.shape[1])
        values = values[:, np.maximum(np.arange(self._states), first) - first]
        off, without, held = np.split(
            values, [self._classes, 2 * self._classes - 1], axis=0
        )
        return off, np.maximum(without, held)

    def tree(self, match_class: int, state: int, rows: int) -> PlainTree:
        """The tree of ``values[match_class, state, rows]``, in serving order."""
        parents: list[int] = []
        ranks: list[int] = []
        prompts: list[int] = []
        reached: list[float] = []
        # (parent, rank, chance to be reached, depth, on chain, rows of the subtree)
        pending = [(-1, 0, 1.0, 0, match_class > 0, rows)]
        while pending:
            parent, rank, chance, depth, on, budget = pending.pop()
            if parent >= 0:
                parents.append(parent)
                ranks.append(rank)
            count, children = self._choose(match_class, state, depth, on, budget)
            here = len(prompts)
            prompts.append(count)
            reached.append(chance)
            for child, right, share in reversed(children):
                follows = on and child == 0
                pending.append((here, child, chance * right, depth + 1, follows, share))
        plain = PlainTree(tuple(parents), tuple(ranks), tuple(prompts), self._num_ept)
        return arrange(plain, np.array(reached))

    def _choose(
        self, match_class: int, state: int, depth: int, on: bool, rows: int
    ) -> tuple[int, list[tuple[int, float, int]]]:
        """How the best subtree begins: prompt tokens; rank, chance, rows by child."""
        level = self._levels[depth]
        deepest = depth == len(self._candidates)
        first = self._states - 1 if deepest else self._candidates[depth].first
        sorts = self._states - first
        kind = self._classes + match_class - 1 if on else match_class
        node = kind * sorts + max(state - first, 0)
        if on:
            held = node + (self._classes - 1) * sorts
            if level.values[held, rows] > level.values[node, rows]:
                node = held
        if (depth, node, rows) not in self._choices:
            count, chain_rows, shares = level.choose(node, rows)
            children = []
            if chain_rows:
                chain = self._candidates[depth].chain[node - len(level.values)]
                children.append((0, float(chain), chain_rows))
            for index, share in shares:
                chance = float(self._candidates[depth].chances[node, index])
                rank = int(self._candidates[depth].ranks[node, index]) + on
                children.append((rank, chance, share))
            self._choices[depth, node, rows] = count, children
        return self._choices[depth, node, rows]
