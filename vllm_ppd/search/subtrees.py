"""The best subtrees of the nodes of one depth, exactly, by dynamic programming.

Given what it is worth, h(k), that a walk ends on a node with k prompt tokens, a tree T
is worth f(T) + sum over nodes v of residual(v) h(k_v), which is

    h(k_root) + sum over candidates v with parent u of P(v) (1 + h(k_v) - h(k_u)).

So the worth of a subtree is P(its top) times a figure that does not depend on the ranks
that led there. With n counting all rows:

    node(n)       = max over k of h(k) + children_k(n - 1 - k * num_ept)
    children_k(n) = max over r and n_1 + ... + n_r <= n, all at least 1, of
                    sum over the r likeliest ranks of chance * (1 - h(k) + below(n_i))
                  = max over r of (1 - h(k)) * (sum of the r chances) + shared_r(n)

`below` being the node one level deeper. How r children best share n rows, shared_r, is
the costly part, and the same for every k: hence r children, no more and no fewer. That
loses nothing: what a child adds in an optimum is positive, so it has a likelier rank
wherever one is free.

Adding or removing single rows by their gain, as the paper does, is not always optimal:
a row may pay only together with others, and a child lowers what its parent's prompt
tokens are worth. The tables take both into account.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Subtrees", "useful_rows"]

# Sums tried at once when sharing rows among siblings: 1 MiB stays in the cache.
_BLOCK = 1 << 17


class Subtrees:
    """The best subtree of every row count, for B sorts of node of the same depth.

    Args:
        ends: [B, m + 1] h, in tokens, by prompt tokens on the node.
        chances: [B, R] chance of each candidate below the node, falling.
        below: [B, n + 1] `values` of those candidates, for up to n rows.
        num_ept: rows per prompt token.
        held: [H] chance and [H, n + 1] `values` of one more child, which the last H
            sorts of node have in any case.
    """

    values: np.ndarray
    """[B, n + 1] worth of the best subtree with at most so many rows, in tokens, for a
    walk that reaches its top; minus infinity at 0 rows."""

    def __init__(
        self,
        ends: np.ndarray,
        chances: np.ndarray,
        below: np.ndarray,
        num_ept: int,
        held: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self._ends, self._num_ept = ends, num_ept
        self._chances, self._below = chances, below
        total, shared = np.zeros(len(below)), np.zeros(below.shape)
        self._free = len(below)
        if held is not None:
            self._free -= len(held[0])
            total[self._free :] = held[0]
            shared[self._free :] = _times(*held)
        # By number of children r (that in `held` not counted): sum of their chances
        # [B], and shared_r [B, n + 1].
        self._totals, self._shared = [total], [shared]
        # [B, m + 1, n + 1] children_k(n).
        self._children = self._with_prompts(total, shared)
        self._add_children()
        self.values = np.full(below.shape, -np.inf)
        for count, worth in enumerate(ends.T):
            first = 1 + count * num_ept
            if first < below.shape[1]:
                here = worth[:, None] + self._children[:, count, :-first]
                np.maximum(self.values[:, first:], here, out=self.values[:, first:])

    def choose(self, node: int, rows: int) -> tuple[int, int, list[tuple[int, int]]]:
        """How the best subtree with at most `rows` rows begins.

        Returns:
            the prompt tokens of its top, the rows of the child in `held`, and index
            among the chances and rows of each other child.
        """
        left = rows - 1 - self._num_ept * np.arange(self._ends.shape[1])
        fits = int((left >= 0).sum())
        children = self._children[node, np.arange(fits), left[:fits]]
        count = int(np.argmax(self._ends[node, :fits] + children))
        budget, paid = int(left[count]), 1 - self._ends[node, count]
        totals = np.array([total[node] for total in self._totals])
        shared = np.array([table[node, budget] for table in self._shared])
        shares = []
        for rank in range(int(np.argmax(paid * totals + shared)) - 1, -1, -1):
            most = budget // (rank + 1)
            others = self._shared[rank][node, budget - most : budget][::-1]
            own = self._chances[node, rank] * self._below[node, 1 : most + 1]
            shares.append((rank, 1 + int(np.argmax(others + own))))
            budget -= shares[-1][1]
        return count, budget if node >= self._free else 0, shares

    def _with_prompts(self, total: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """[B, m + 1, n + 1] what children add by the prompt tokens of their parent."""
        return ((1 - self._ends) * total[:, None])[..., None] + shared[:, None]

    def _add_children(self) -> None:
        """Fill the tables for one child more, as long as there are candidates."""
        below = self._below
        # Subtrees that a row more makes no better are not worth that row.
        sizes = np.flatnonzero((below[:, 1:] > below[:, :-1]).any(axis=0)) + 1
        added = _times(self._chances.T, below)  # [R, B, n + 1]
        pairs = zip(self._chances.T, added, strict=True)
        for count, (chance, own) in enumerate(pairs, start=1):
            # The likelier of two siblings never has the smaller subtree (otherwise
            # exchange them), so this one gets at most an equal share.
            sizes = sizes[sizes * count < below.shape[1]]
            if not len(sizes) or not chance.any():
                break
            # An only child has all the rows.
            alone = self._free if count == 1 else 0
            shared = own
            if alone < len(below):
                others = self._shared[-1][alone:]
                shared = _share_rows(others, own[alone:], sizes, count)
                if alone:
                    shared = np.concatenate([own[:alone], shared])
            self._totals.append(self._totals[-1] + chance)
            self._shared.append(shared)
            here = self._with_prompts(self._totals[-1], shared)
            np.maximum(self._children, here, out=self._children)


def useful_rows(
    tokens: np.ndarray, relative_values: np.ndarray, speed: float, seconds: np.ndarray
) -> int:
    """Rows beyond which no tree can improve a policy: they cost more than it can win.

    Args:
        tokens: [S] at least the mean tokens of a step with any tree, by state.
        relative_values: [S] of the policy, in tokens.
        speed: its tokens per second.
        seconds: [n] of a step with 1, 2, ... n rows, never falling.
    """
    most = (tokens + relative_values.max() - relative_values).max()
    return max(1, int(np.searchsorted(speed * seconds, most, side="right")))


def _times(chances: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[..., B, n + 1] what children of `chances` [..., B] add by their rows."""
    # The minus infinity at no rows stays one, also where a chance is 0.
    added = np.full((*chances.shape, values.shape[1]), -np.inf)
    np.multiply(chances[..., None], values[:, 1:], out=added[..., 1:])
    return added


def _share_rows(
    others: np.ndarray, own: np.ndarray, sizes: np.ndarray, count: int
) -> np.ndarray:
    """[B, n + 1] max over j in `sizes`, j <= n / count, of others[n - j] + own[j]."""
    best = np.full(others.shape, -np.inf)
    nodes, width = others.shape
    largest = int(sizes[-1])
    padded = np.full((nodes, largest + width), -np.inf)
    padded[:, largest:] = others
    # [largest + 1, B, n + 1]: entry i is `others` moved by largest - i. (A
    # sliding_window_view, which is slow to make for so few numbers.)
    item = padded.itemsize
    moved = np.ndarray(
        (largest + 1, nodes, width),
        padded.dtype,
        padded,
        strides=(item, padded.strides[0], item),
    )
    gains = own.T
    step = max(1, _BLOCK // others.size)
    for start in range(0, len(sizes), step):
        block = sizes[start : start + step]
        first = int(block[0]) * count
        sums = moved[largest - block, :, first:]
        sums += gains[block][..., None]
        np.maximum(best[:, first:], sums.max(axis=0), out=best[:, first:])
    return best
