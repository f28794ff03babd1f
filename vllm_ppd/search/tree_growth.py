"""The best tree of every state and row count, for given relative values.

A candidate at some depth is as likely in the tree of one state as in that of another,
and independent of the ranks above it. So the tables of `subtrees` are filled once for
all trees, deepest level first: below a node at depth d, only how far the prompt rows of
the state look beyond it makes a difference.
"""

from __future__ import annotations

import numpy as np

from vllm_ppd.search.subtrees import Subtrees
from vllm_ppd.trees.plain_tree import PlainTree, arrange, path_probabilities

__all__ = ["BestTrees"]


class BestTrees:
    """The most valuable tree of every state and row count, for given h.

    Args:
        acceptance: [m, K] chance of each rank at each depth.
        relative_values: [m + 1] h, in tokens.
        max_rows: rows of the largest tree, at least 1.
        num_ept: rows per prompt token.
    """

    values: np.ndarray
    """[m + 1, max_rows + 1] worth of the best tree of each state with at most that
    many rows, in tokens; minus infinity at 0 rows."""

    def __init__(
        self,
        acceptance: np.ndarray,
        relative_values: np.ndarray,
        max_rows: int,
        num_ept: int,
    ) -> None:
        self._acceptance = acceptance
        self._ranks = np.argsort(-acceptance, axis=1, kind="stable")
        self._num_ept = num_ept
        self._choices: dict[tuple[int, int, int], tuple[int, list]] = {}
        sorted_chances = np.take_along_axis(acceptance, self._ranks, axis=1)
        nothing = np.full((1, max_rows + 1), -np.inf)
        # No prompt row of state d looks beyond a node at depth d.
        self._last = Subtrees(relative_values[None], np.empty((1, 0)), nothing, num_ept)
        # By depth: nodes in the trees of states depth + 1, ..., m.
        self._levels: list[Subtrees] = []
        values = self._last.values
        for chances in sorted_chances[::-1]:
            level = Subtrees(
                np.tile(relative_values, (len(values), 1)),
                np.tile(chances, (len(values), 1)),
                values,
                num_ept,
            )
            self._levels.insert(0, level)
            values = np.concatenate([self._last.values, level.values])
        self.values = values

    def tree(self, state: int, rows: int) -> PlainTree:
        """The tree that attains `values[state, rows]`, in serving order."""
        parents: list[int] = []
        ranks: list[int] = []
        prompts: list[int] = []
        pending = [(-1, -1, 0, rows)]  # parent, rank, depth, rows of the subtree
        while pending:
            parent, rank, depth, budget = pending.pop()
            if parent >= 0:
                parents.append(parent)
                ranks.append(rank)
            key = state, depth, budget
            if key not in self._choices:
                self._choices[key] = self._choose(*key)
            count, shares = self._choices[key]
            for child_rank, share in shares:
                pending.append((len(prompts), child_rank, depth + 1, share))
            prompts.append(count)
        plain = PlainTree(tuple(parents), tuple(ranks), tuple(prompts), self._num_ept)
        reached = path_probabilities(plain.parents, plain.ranks, self._acceptance)
        return arrange(plain, reached)

    def _choose(self, state: int, depth: int, rows: int) -> tuple[int, list]:
        """Prompt tokens, and (rank, rows) of the children, of the best subtree."""
        if depth == state:
            return self._last.choose(0, rows)[0], []
        count, _, shares = self._levels[depth].choose(state - depth - 1, rows)
        return count, [(int(self._ranks[depth, each]), n) for each, n in shares]
