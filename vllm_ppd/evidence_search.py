"""The policies with the most tokens per second when guesses have several sources.

The problem of `tree_search`, with two more things to look at: the state of a request
is (prompt tokens at hand, match class), and a node is off or on the chain of an
earlier match. Both the chances below a node and the worth of where a walk ends depend
on them; otherwise the dynamic programme is that of `tree_growth`, per state:

    node(n)       = max over k of h(k) + children_k(n - 1 - k * num_ept)
    children_k(n) = best sharing of n rows among the ranks, each child worth
                    chance * max(0, 1 - h(k) + node one level deeper)

with h(k) the mean of the relative values h(k, c') over the next match class c', which
is another mean at the root, where a walk that ends has accepted nothing, than below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ppd.evidence import Evidence
from vllm_ppd.latency import LatencyCurve
from vllm_ppd.plain_tree import PlainTree, arrange
from vllm_ppd.plan import Tier
from vllm_ppd.tree import SparseTree, TreePolicy
from vllm_ppd.tree_growth import share_rows

__all__ = ["EvidencePolicy", "best_policy", "node_chances", "policy_value"]

# By match class and state.
Trees = Sequence[Sequence[PlainTree | SparseTree]]

# Requests end; one step in so many starts anew. It also keeps the chain of states in
# one piece, whatever the trees are.
_RESTART = 1e-4
_TOLERANCE = 1e-9
# A candidate that is hardly ever right is not looked at.
_LEAST_CHANCE = 2e-3
_MAX_ROUNDS = 50


@dataclass(frozen=True)
class EvidencePolicy:
    """Trees by match class and state, and what they are worth.

    Attributes:
        trees: [C + 1][m + 1].
        tau: mean tokens per step.
        tokens_per_second: of one request.
        state_distribution: [C + 1, m + 1] share of steps made in each state.
    """

    trees: tuple[tuple[PlainTree, ...], ...]
    tau: float
    tokens_per_second: float
    state_distribution: np.ndarray

    def tier(self, max_requests: int | None) -> Tier:
        """As a tier of a plan, ready to be served."""
        policies = (
            TreePolicy(tuple(SparseTree(*tree) for tree in trees))
            for trees in self.trees
        )
        return Tier(max_requests, tuple(policies))

    @property
    def max_rows(self) -> int:
        return max(tree.num_rows for trees in self.trees for tree in trees)

    @property
    def mean_rows(self) -> float:
        rows = np.array([[tree.num_rows for tree in trees] for trees in self.trees])
        return float((rows * self.state_distribution).sum())


def node_chances(
    tree: PlainTree | SparseTree, evidence: Evidence, state: int, match_class: int
) -> np.ndarray:
    """[nodes] chance that verification reaches each node, root (1) first."""
    reached, depths, chain = [1.0], [0], [match_class > 0]
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        depths.append(depths[parent] + 1)
        chances = evidence.chances(state, match_class, depths[-1], chain[parent])
        chance = float(chances[rank]) if rank < len(chances) else 0.0
        chain.append(chain[parent] and rank == 0)
        reached.append(reached[parent] * chance)
    return np.array(reached)


def policy_value(
    trees: Trees,
    evidence: Evidence,
    latency: LatencyCurve,
) -> tuple[float, float, np.ndarray]:
    """(tokens per step, tokens per second, [C + 1, m + 1] state distribution)."""
    tokens, seconds, moves = _chain(trees, evidence, latency)
    size = len(tokens)
    system = np.vstack([(np.eye(size) - moves).T, np.ones(size)])
    share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    tau = float(share @ tokens)
    shape = (evidence.num_classes, evidence.num_prompt_tokens + 1)
    return tau, tau / float(share @ seconds), share.reshape(shape)


def best_policy(
    evidence: Evidence,
    latency: LatencyCurve,
    max_rows: int,
    num_ept: int = 1,
    start: EvidencePolicy | None = None,
) -> EvidencePolicy:
    """The policy with the most tokens per second in the long run.

    Args:
        evidence: chances of the candidates.
        latency: seconds of a step by the rows of one request.
        max_rows: most rows per step and request, root included, at least 1.
        num_ept: rows per prompt token.
        start: the policy of a similar search, to begin with.
    """
    m, classes = evidence.num_prompt_tokens, evidence.num_classes
    fitting = min(m, (max_rows - 1) // num_ept)
    bare = PlainTree((), (), (fitting,), num_ept)
    trees = [[bare] * (m + 1) for _ in range(classes)]
    if start is not None:
        trees = [list(row) for row in start.trees]
    cost = latency(np.arange(1, max_rows + 1))
    for _ in range(_MAX_ROUNDS):
        tokens, seconds, moves = _chain(trees, evidence, latency)
        speed, h = _relative_values(tokens, seconds, moves)
        h = h.reshape(classes, m + 1)
        changed = False
        for match_class in range(classes):
            ahead = (1 - _RESTART) * evidence.moves[:, match_class] @ h
            for state in range(m + 1):
                growth = _Growth(evidence, state, match_class, ahead, max_rows, num_ept)
                worth = 1 + growth.values[1:] - speed * cost
                least = _TOLERANCE * (1 + np.abs(h).max())
                here = h[match_class, state]
                if worth.max() > here + 10 * least:
                    rows = int(np.argmax(worth >= worth.max() - least)) + 1
                    trees[match_class][state] = growth.tree(rows)
                    changed = True
        if not changed:
            break
    chosen = tuple(tuple(row) for row in trees)
    return EvidencePolicy(chosen, *policy_value(chosen, evidence, latency))


def _chain(
    trees: Trees, evidence: Evidence, latency: LatencyCurve
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [S], seconds [S] and moves [S, S] of the states, class major."""
    m, classes = evidence.num_prompt_tokens, evidence.num_classes
    size = classes * (m + 1)
    tokens, seconds = np.empty(size), np.empty(size)
    moves = np.zeros((size, size))
    for match_class in range(classes):
        for state in range(m + 1):
            tree = trees[match_class][state]
            at = match_class * (m + 1) + state
            reached = node_chances(tree, evidence, state, match_class)
            ends = reached.copy()
            np.subtract.at(ends, np.array(tree.parents, dtype=int), reached[1:])
            ends = np.maximum(ends, 0) / np.maximum(ends, 0).sum()
            # Walks that end at the root, and those that accepted something.
            after = np.zeros((2, m + 1))
            after[0, tree.prompts[0]] = ends[0]
            after[1] = np.bincount(tree.prompts[1:], ends[1:], m + 1)
            tokens[at] = reached.sum()
            seconds[at] = float(latency(np.array([tree.num_rows]))[0])
            moves[at] = (evidence.moves[:, match_class].T @ after).ravel()
    moves *= 1 - _RESTART
    moves[:, 0] += _RESTART
    return tokens, seconds, moves


def _relative_values(
    tokens: np.ndarray, seconds: np.ndarray, moves: np.ndarray
) -> tuple[float, np.ndarray]:
    """Tokens per second g, and h with h[0] = 0: h = tokens - g seconds + moves h."""
    system = np.eye(len(tokens)) - moves
    system[:, 0] = seconds
    solution = np.linalg.solve(system, tokens)
    return float(solution[0]), np.append(0.0, solution[1:])


class _Growth:
    """The most valuable tree of one (state, class) for every row count."""

    values: np.ndarray
    """[max_rows + 1] worth of the best tree with at most that many rows."""

    def __init__(
        self,
        evidence: Evidence,
        state: int,
        match_class: int,
        ahead: np.ndarray,
        max_rows: int,
        num_ept: int,
    ):
        self._where = evidence, state, match_class
        # [2, m + 1] worth of where a walk ends by prompt tokens: at the root, below it.
        self._ahead, self._num_ept, self._max_rows = ahead, num_ept, max_rows
        # By (depth, on chain): values of a node, and the children's tables.
        self._sums: dict[tuple[int, bool], list[np.ndarray]] = {}
        self._gains: dict[tuple[int, bool], list[np.ndarray]] = {}
        self._ranks: dict[tuple[int, bool], list[int]] = {}
        nodes: dict[bool, np.ndarray] = {}
        kinds = (False, True) if match_class else (False,)
        deepest = evidence.max_depth(match_class)
        for depth in range(min(deepest, max_rows - 1), -1, -1):
            nodes = {on: self._fill(depth, on, nodes) for on in kinds}
        self.values = nodes[match_class > 0]

    def _fill(self, depth: int, on: bool, deeper: dict[bool, np.ndarray]) -> np.ndarray:
        width = self._max_rows + 1
        evidence, state, match_class = self._where
        h = self._ahead[min(depth, 1)]
        sums = [np.zeros((1, len(h), width))]
        gains: list[np.ndarray] = []
        ranks: list[int] = []
        if deeper:
            chances = evidence.chances(state, match_class, depth + 1, on)
            # The chain's child first, then by falling chance; ranks may not fall.
            order = np.argsort(-chances, kind="stable").tolist()
            # By kind of child: what a subtree is worth, and at which sizes that rises.
            worths = {
                kind: np.maximum(1 - h[:, None] + node, 0)[None]
                for kind, node in deeper.items()
            }
            rising = {
                kind: np.flatnonzero(
                    (worth[..., 1:] > worth[..., :-1] + 1e-15).any(axis=(0, 1))
                )
                + 1
                for kind, worth in worths.items()
            }
            for rank in order[: self._max_rows - 1]:
                if chances[rank] < _LEAST_CHANCE:
                    continue
                kind = on and rank == 0
                extra, sizes = chances[rank] * worths[kind], rising[kind]
                # Siblings of one kind: the likelier never has the smaller subtree.
                equal = sum((on and r == 0) == kind for r in ranks)
                sizes = sizes[sizes <= self._max_rows // (equal + 1)]
                if not len(sizes):
                    continue
                sums.append(share_rows(sums[-1], extra, sizes))
                gains.append(extra[0])
                ranks.append(rank)
        self._sums[depth, on], self._gains[depth, on] = sums, gains
        self._ranks[depth, on] = ranks
        values = np.full(width, -np.inf)
        for count, worth in enumerate(h):
            first = 1 + count * self._num_ept
            if first < width:
                here = worth + sums[-1][0, count, : width - first]
                np.maximum(values[first:], here, out=values[first:])
        return values

    def tree(self, rows: int) -> PlainTree:
        """The tree that attains ``values[rows]``, in serving order."""
        evidence, state, match_class = self._where
        parents: list[int] = []
        ranks: list[int] = []
        prompts: list[int] = []
        # (parent, rank, depth, on chain, rows of the subtree)
        pending = [(-1, 0, 0, match_class > 0, rows)]
        while pending:
            parent, rank, depth, on, budget = pending.pop()
            if parent >= 0:
                parents.append(parent)
                ranks.append(rank)
            count, shares = self._choose(depth, on, budget)
            here = len(prompts)
            prompts.append(count)
            for child, share in reversed(shares):
                pending.append((here, child, depth + 1, on and child == 0, share))
        plain = PlainTree(tuple(parents), tuple(ranks), tuple(prompts), self._num_ept)
        return arrange(plain, node_chances(plain, evidence, state, match_class))

    def _choose(
        self, depth: int, on: bool, rows: int
    ) -> tuple[int, list[tuple[int, int]]]:
        """Prompt tokens, and (rank, rows) of the children, of the best subtree."""
        sums, gains = self._sums[depth, on], self._gains[depth, on]
        h = self._ahead[min(depth, 1)]
        left = rows - 1 - self._num_ept * np.arange(len(h))
        fits = int((left >= 0).sum())
        totals = h[:fits] + sums[-1][0, np.arange(fits), left[:fits]]
        count = int(np.argmax(totals >= totals.max() - 1e-13))
        budget, shares = int(left[count]), []
        for index in range(len(gains) - 1, -1, -1):
            before = sums[index][0, count, : budget + 1][::-1]
            total = before + gains[index][count, : budget + 1]
            share = int(np.argmax(total >= total.max() - 1e-13))
            if share:
                shares.append((self._ranks[depth, on][index], share))
                budget -= share
        return count, shares[::-1]
