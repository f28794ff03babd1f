"""The most valuable tree of every row count, exactly, by dynamic programming.

Let h(k) be what it is worth that a walk ends on a node with k prompt tokens. A tree T
is then worth f(T) + sum over nodes v of residual(v) h(k_v), which is

    h(k_root) + sum over draft tokens v with parent u of P(v) (1 + h(k_v) - h(k_u)).

So the worth of a subtree is P(its top) times a figure that does not depend on the ranks
above it. With n counting all rows:

    node(n)       = max over k of h(k) + children_k(n - 1 - k * num_ept)
    children_k(n) = max over r and n_1 + ... + n_r <= n, all at least 1, of
                    sum over the r likeliest ranks of p * (1 - h(k) + below(n_i))
                  = max over r of (1 - h(k)) * (sum of the r p's) + shared_r(n)

`below` is the node one level deeper. How r children best share n rows, shared_r, is the
costly part, and the same for every k: hence r children, no more and no fewer. That
loses nothing: what a child adds in an optimum is positive, so it has a likelier rank if
one is free.

Adding or removing single rows by their gain, as the paper does, is not always optimal:
a row may pay only together with others, and a child lowers what its parent's prompt
tokens are worth. The tables take both into account.

Acceptance probabilities below a node, and what it is worth that a walk ends there,
depend on num_prompted (how deep the last step's prompt rows reach), on the match class,
and on whether the node is on the n-gram draft. Each combination has its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.tree import SparseTree

# Acceptance probabilities below this count as 0.
_LEAST_PROBABILITY = 2e-3


class _Subtrees:
    """The best subtree of every row count, for B kinds of node of the same depth.

    Args:
        ends: [B, m + 1] h, in tokens, by prompt tokens on the node.
        probabilities: [B, R] of each draft token below the node, falling.
        below: [B, n + 1] `values` of those draft tokens, for up to n rows.
        num_ept: rows per prompt token.
        held: [H] probability and [H, n + 1] `values` of one more child, which the last
            H kinds of node always have.
    """

    values: np.ndarray
    """[B, n + 1] worth of the best subtree with at most so many rows, in tokens, for a
    walk that reaches its top; minus infinity at 0 rows."""

    def __init__(
        self,
        ends: np.ndarray,
        probabilities: np.ndarray,
        below: np.ndarray,
        num_ept: int,
        held: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self._ends, self._num_ept = ends, num_ept
        self._probabilities, self._below = probabilities, below
        total, shared = np.zeros(len(below)), np.zeros(below.shape)
        self._free = len(below)
        if held is not None:
            self._free -= len(held[0])
            total[self._free :] = held[0]
            shared[self._free :] = _times(*held)
        # By number of children r (that in `held` not counted): sum of their
        # probabilities [B], and shared_r [B, n + 1].
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
            among the probabilities and rows of each other child.
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
            limit = budget // (rank + 1)
            others = self._shared[rank][node, budget - limit : budget][::-1]
            own = self._probabilities[node, rank] * self._below[node, 1 : limit + 1]
            shares.append((rank, 1 + int(np.argmax(others + own))))
            budget -= shares[-1][1]
        return count, budget if node >= self._free else 0, shares

    def _with_prompts(self, total: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """[B, m + 1, n + 1] what children add by the prompt tokens of their parent."""
        return ((1 - self._ends) * total[:, None])[..., None] + shared[:, None]

    def _add_children(self) -> None:
        """Fill the tables for one child more, as long as one can be accepted."""
        below = self._below
        # A subtree that one more row does not improve does not need that row.
        sizes = np.flatnonzero((below[:, 1:] > below[:, :-1]).any(axis=0)) + 1
        added = _times(self._probabilities.T, below)  # [R, B, n + 1]
        pairs = zip(self._probabilities.T, added, strict=True)
        for count, (probability, own) in enumerate(pairs, start=1):
            # The likelier of two siblings never has the smaller subtree (otherwise
            # exchange them), so this one gets at most an equal share.
            sizes = sizes[sizes * count < below.shape[1]]
            if not len(sizes) or not probability.any():
                break
            shared = _share_rows(self._shared[-1], own, sizes, count)
            self._totals.append(self._totals[-1] + probability)
            self._shared.append(shared)
            here = self._with_prompts(self._totals[-1], shared)
            np.maximum(self._children, here, out=self._children)


def _times(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[..., B, n + 1] what children of `probabilities` [..., B] add by their rows."""
    # The minus infinity at 0 rows remains, also where a probability is 0.
    added = np.full((*probabilities.shape, values.shape[1]), -np.inf)
    np.multiply(probabilities[..., None], values[:, 1:], out=added[..., 1:])
    return added


def _share_rows(
    others: np.ndarray, own: np.ndarray, sizes: np.ndarray, count: int
) -> np.ndarray:
    """[B, n + 1] max over j in `sizes`, j <= n / count, of others[n - j] + own[j]."""
    best = np.full(others.shape, -np.inf)
    for size in sizes.tolist():
        first = size * count
        sums = others[:, first - size : -size] + own[:, size, None]
        np.maximum(best[:, first:], sums, out=best[:, first:])
    return best


class DepthProbabilities(NamedTuple):
    """Acceptance probabilities of the draft tokens at one depth; independent of h.

    With C match classes besides that of no match there are 1 + 3 C sorts of parent: off
    the n-gram draft in each class; and in each class with a match, on the n-gram draft
    without its next token in the tree, and with it. Each has S values of num_prompted.
    """

    first: int
    """The least of the S values of num_prompted; below it, nothing differs."""
    ordinary: np.ndarray
    """[(1 + 3 C) * S, K] of the draft tokens that are not the n-gram's, falling."""
    ranks: np.ndarray
    """[(1 + 3 C) * S, K] of them, as counted off the n-gram draft."""
    ngram: np.ndarray
    """[C * S] of the n-gram draft's token."""

    @classmethod
    def of(cls, model: AcceptanceModel, depth: int) -> DepthProbabilities:
        """Those at `depth`, from 1."""
        m, k = model.prompted.shape
        first = min(depth - 1, m)

        def probabilities(on_ngram: bool) -> np.ndarray:
            rows = [
                model.probabilities(num_prompted, match_class, depth, on_ngram)
                for match_class in range(on_ngram, model.num_classes)
                for num_prompted in range(first, m + 1)
            ]
            return np.reshape(rows, (-1, k + on_ngram))

        on = probabilities(True)
        ordinary = np.concatenate([probabilities(False), on[:, 1:], on[:, 1:]])
        ordinary[ordinary < _LEAST_PROBABILITY] = 0
        ranks = np.argsort(-ordinary, axis=1, kind="stable")
        return cls(
            first,
            np.take_along_axis(ordinary, ranks, axis=1),
            ranks,
            np.where(on[:, 0] < _LEAST_PROBABILITY, 0, on[:, 0]),
        )


# The searches of a menu, one after the other, share one model.
@lru_cache(maxsize=1)
def probabilities_by_depth(model: AcceptanceModel) -> tuple[DepthProbabilities, ...]:
    """Those at depth 1, 2, ... as deep as any draft token can be accepted."""
    deepest = max(model.max_depth(each) for each in range(model.num_classes))
    return tuple(DepthProbabilities.of(model, depth) for depth in range(1, deepest + 1))


class BestTrees:
    """The most valuable trees for given h.

    Args:
        depths: acceptance probabilities, as deep as the trees may be.
        ahead: [2, C + 1, m + 1] what it is worth, in tokens, that a walk ends at the
            root, or below it, by match class and prompt tokens.
        max_rows: rows of the largest tree, at least 1.
        num_ept: rows per prompt token.
    """

    values: np.ndarray
    """[C + 1, m + 1, max_rows + 1] worth of the best tree with at most that many rows,
    in tokens, by match class and num_prompted; minus infinity at 0 rows."""

    def __init__(
        self,
        depths: Sequence[DepthProbabilities],
        ahead: np.ndarray,
        max_rows: int,
        num_ept: int,
    ):
        self._num_ept = num_ept
        self._depths = depths[: max_rows - 1]
        self._classes, self._num_prompted = ahead.shape[1:]
        self._choices: dict[tuple[int, int, int], tuple[int, list]] = {}
        matches = range(1, self._classes)
        sorts = [*range(self._classes), *matches, *matches]
        # Below the deepest draft tokens.
        ends = ahead[min(len(self._depths), 1), sorts]
        nothing = np.full((len(sorts), max_rows + 1), -np.inf)
        level = _Subtrees(ends, np.empty((len(sorts), 0)), nothing, num_ept)
        self._levels = [level]
        first = self._num_prompted - 1
        for depth in range(len(self._depths) - 1, -1, -1):
            off, on = self._by_num_prompted(level.values, first)
            first, ordinary, _, ngram = self._depths[depth]
            count = self._num_prompted - first
            ends = np.repeat(ahead[min(depth, 1), sorts], count, axis=0)
            below = off[sorts, first:].reshape(-1, max_rows + 1)
            held = ngram, on[:, first:].reshape(-1, max_rows + 1)
            level = _Subtrees(ends, ordinary, below, num_ept, held)
            self._levels.insert(0, level)
        off, on = self._by_num_prompted(level.values, first)
        self.values = np.concatenate([off[:1], on])

    def _by_num_prompted(
        self, values: np.ndarray, first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[C + 1, m + 1, n + 1] off and [C, m + 1, n + 1] on the n-gram draft."""
        values = values.reshape(-1, self._num_prompted - first, values.shape[1])
        values = values[:, np.maximum(np.arange(self._num_prompted), first) - first]
        off, without, held = np.split(
            values, [self._classes, 2 * self._classes - 1], axis=0
        )
        return off, np.maximum(without, held)

    def tree(self, match_class: int, num_prompted: int, rows: int) -> SparseTree:
        """The tree of ``values[match_class, num_prompted, rows]``, in serving order."""
        parents: list[int] = []
        ranks: list[int] = []
        prompts: list[int] = []
        reached: list[float] = []
        # (parent, rank, probability to be reached, depth, on n-gram draft, rows)
        pending = [(-1, 0, 1.0, 0, match_class > 0, rows)]
        while pending:
            parent, rank, here, depth, on_ngram, budget = pending.pop()
            if parent >= 0:
                parents.append(parent)
                ranks.append(rank)
            count, children = self._choose(
                match_class, num_prompted, depth, on_ngram, budget
            )
            node = len(prompts)
            prompts.append(count)
            reached.append(here)
            for child, p, share in reversed(children):
                follows = on_ngram and child == 0
                pending.append((node, child, here * p, depth + 1, follows, share))
        tree = SparseTree(tuple(parents), tuple(ranks), tuple(prompts), self._num_ept)
        return tree.in_serving_order(np.array(reached))

    def _choose(
        self, match_class: int, num_prompted: int, depth: int, on_ngram: bool, rows: int
    ) -> tuple[int, list[tuple[int, float, int]]]:
        """How the best subtree begins.

        Returns:
            prompt tokens of its top, and (rank, probability, rows) of its children.
        """
        level = self._levels[depth]
        deepest = depth == len(self._depths)
        first = self._num_prompted - 1 if deepest else self._depths[depth].first
        count = self._num_prompted - first
        sort = self._classes + match_class - 1 if on_ngram else match_class
        node = sort * count + max(num_prompted - first, 0)
        if on_ngram:
            held = node + (self._classes - 1) * count
            if level.values[held, rows] > level.values[node, rows]:
                node = held
        if (depth, node, rows) not in self._choices:
            prompts, ngram_rows, shares = level.choose(node, rows)
            children = []
            if ngram_rows:
                p = self._depths[depth].ngram[node - len(level.values)]
                children.append((0, float(p), ngram_rows))
            for index, share in shares:
                p = self._depths[depth].ordinary[node, index]
                rank = int(self._depths[depth].ranks[node, index]) + on_ngram
                children.append((rank, float(p), share))
            self._choices[depth, node, rows] = prompts, children
        return self._choices[depth, node, rows]
