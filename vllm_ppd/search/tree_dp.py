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

Below a node at depth d it makes a difference how deep the prompt rows of the last step
reach, what the match class is, and whether the node is on the n-gram draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.plain_tree import PlainTree, arrange

__all__ = [
    "Candidates",
    "TypedTrees",
    "candidates_by_depth",
    "most_tokens",
    "useful_rows",
]

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


# A draft token that is hardly ever right is not looked at.
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
                acceptance.probabilities(state, match_class, depth, on_chain)
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
