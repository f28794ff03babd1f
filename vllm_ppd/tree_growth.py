"""The best tree for every row count, exactly, by dynamic programming.

Given relative values h (tokens; h(k) is the worth of ending on a node with k prompt
tokens), a tree T is worth f(T) + sum over nodes v of residual(v) h(k_v), which is

    h(k_root) + sum over candidates v with parent u of P(v) (1 + h(k_v) - h(k_u)).

So the worth of a subtree is P(its top) times a figure that depends on the depth of
its top, its rows, and the prompt tokens of its parent only: not on the ranks that led
there. That leaves small tables to fill, deepest level first, with n counting all rows:

    node(n)      = max over k of h(k) + children_k(n - 1 - k * num_ept)
    children_k(n) = max over n_0 + n_1 + ... <= n of
                    sum over ranks r of acceptance[depth][r] * gain_k(n_r)
    gain_k(n)    = max(0, 1 - h(k) + node one level deeper (n)),   gain_k(0) = 0

Adding or removing single rows by their gain, as the paper does, is not always optimal:
a row may pay only together with others, and a child lowers what its parent's prompt
tokens are worth. The tables take both into account.
"""

from __future__ import annotations

import numpy as np

from vllm_ppd.plain_tree import PlainTree, arrange, path_probabilities

__all__ = ["BestTrees"]

# Sums tried at once when sharing rows among siblings: 1 MiB stays in the cache.
_BLOCK = 1 << 17


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
        self._sorted = np.take_along_axis(acceptance, self._ranks, axis=1)
        self._h = relative_values
        self._max_rows = max_rows
        self._num_ept = num_ept
        # The subtree of a node at `depth` in the tree of `state` has up to `height`
        # = state - depth further levels. All depths of one height are filled together.
        # By height, for depth 0, 1, ...: gain_k(n) of a child, and children_k(n) when
        # only the best 0, 1, 2, ... ranks may be used; [depths, m + 1, max_rows + 1].
        self._gain: list[np.ndarray] = []
        self._children: list[list[np.ndarray]] = []
        self._choices: dict[tuple[int, int, int], tuple[int, list]] = {}
        self.values = self._fill(len(relative_values) - 1)

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
            key = state - depth, depth, budget
            if key not in self._choices:
                self._choices[key] = self._choose(*key)
            count, shares = self._choices[key]
            for child_rank, share in shares:
                pending.append((len(prompts), child_rank, depth + 1, share))
            prompts.append(count)
        plain = PlainTree(tuple(parents), tuple(ranks), tuple(prompts), self._num_ept)
        reached = path_probabilities(plain.parents, plain.ranks, self._acceptance)
        return arrange(plain, reached)

    def _fill(self, num_prompt_tokens: int) -> np.ndarray:
        """Fill all tables; [m + 1, max_rows + 1] node values of the root by state."""
        width = self._max_rows + 1
        roots = []
        values = np.empty(0)
        for height in range(num_prompt_tokens + 1):
            depths = num_prompt_tokens + 1 - height
            sums = [np.zeros((depths, len(self._h), width))]
            gain = sums[0]
            if height:
                # A node at depth d has children at depth d + 1, one level less high.
                gain = np.maximum(1 - self._h[:, None] + values[1:, None], 0)
                self._add_ranks(sums, gain)
            self._gain.append(gain)
            self._children.append(sums)
            values = np.full((depths, width), -np.inf)
            for count, worth in enumerate(self._h):
                first = 1 + count * self._num_ept
                if first < width:
                    here = worth + sums[-1][:, count, : width - first]
                    np.maximum(values[:, first:], here, out=values[:, first:])
            roots.append(values[0])
        return np.stack(roots)

    def _add_ranks(self, sums: list[np.ndarray], gain: np.ndarray) -> None:
        """Append to `sums` what children are worth with one rank more, for each rank.

        gain: [depths, m + 1, max_rows + 1].
        """
        # Only row counts at which a child gains anything can be part of an optimum.
        sizes = np.flatnonzero((gain[..., 1:] > gain[..., :-1]).any(axis=(0, 1))) + 1
        for rank, chance in enumerate(self._sorted[: len(gain)].T):
            # The likelier of two siblings never has the smaller subtree (otherwise
            # exchange them), so this one gets at most an equal share.
            sizes = sizes[sizes <= self._max_rows // (rank + 1)]
            if not len(sizes) or not chance.any():
                break
            extra = chance[:, None, None] * gain
            sums.append(share_rows(sums[-1], extra, sizes) if rank else extra)

    def _choose(self, height: int, depth: int, rows: int) -> tuple[int, list]:
        """Prompt tokens, and (rank, rows) of the children, of the best subtree."""
        left = rows - 1 - self._num_ept * np.arange(len(self._h))
        fits = int((left >= 0).sum())
        sums = [table[depth] for table in self._children[height]]  # [m + 1, n]
        count = int(np.argmax(self._h[:fits] + sums[-1][np.arange(fits), left[:fits]]))
        budget = int(left[count])
        shares = []
        for rank in range(len(sums) - 2, -1, -1):
            most = budget // (rank + 1)
            gain = self._gain[height][depth, count, : most + 1]
            others = sums[rank][count, budget - most : budget + 1][::-1]
            share = int(np.argmax(others + self._sorted[depth, rank] * gain))
            if share:
                shares.append((int(self._ranks[depth, rank]), share))
                budget -= share
        return count, shares


def share_rows(others: np.ndarray, extra: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[depths, m + 1, rows] max over j in {0, *sizes} of others[n - j] + extra[j]."""
    best = others.copy()
    *outer, width = others.shape
    largest = int(sizes[-1])
    padded = np.full((*outer, largest + width), -np.inf)
    padded[..., largest:] = others
    # [largest + 1, depths, m + 1, rows]: entry i is `others` moved by largest - i. (A
    # sliding_window_view, which is slow to make for so few numbers.)
    item = padded.itemsize
    strides = (item, *padded.strides[:-1], item)
    moved = np.ndarray(
        (largest + 1, *outer, width), padded.dtype, padded, strides=strides
    )
    gains = extra.transpose(2, 0, 1)
    step = max(1, _BLOCK // others.size)
    for start in range(0, len(sizes), step):
        block = sizes[start : start + step]
        sums = moved[largest - block]
        sums += gains[block][..., None]
        np.maximum(best, sums.max(axis=0), out=best)
    return best
