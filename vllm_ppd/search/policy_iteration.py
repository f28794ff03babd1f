"""The policies with the most tokens per second when guesses have several sources.

The problem of `tree_search`, with two more things to look at: the state of a request
is (prompt tokens at hand, match class), and a node is off or on the chain of an
earlier match. Both the chances below a node and the worth of where a walk ends depend
on them; otherwise the dynamic programme is the same (`subtrees`, `evidence_growth`),
with h(k) the mean of the relative values h(k, c') over the next match class c', which
is another mean at the root, where a walk that ends has accepted nothing, than below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_dp import (
    TypedTrees,
    candidates_by_depth,
    most_tokens,
    useful_rows,
)
from vllm_ppd.trees.menu import MenuEntry
from vllm_ppd.trees.plain_tree import PlainTree
from vllm_ppd.trees.tree import SparseTree, TreePolicy

__all__ = ["SearchedPolicy", "best_policy", "node_chances", "policy_value"]

# By match class and state.
Trees = Sequence[Sequence[PlainTree | SparseTree]]

# Requests end; one step in so many starts anew. It also keeps the chain of states in
# one piece, whatever the trees are.
_RESTART = 1e-4
_TOLERANCE = 1e-9
_MAX_ROUNDS = 50


@dataclass(frozen=True)
class SearchedPolicy:
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

    def entry(self) -> MenuEntry:
        """As an entry of a tree menu."""
        shares: dict[int, float] = {}
        for trees, row in zip(self.trees, self.state_distribution, strict=True):
            for tree, share in zip(trees, row.tolist(), strict=True):
                # Least squares may leave a hair below zero.
                shares[tree.num_rows] = shares.get(tree.num_rows, 0) + max(0.0, share)
        total = sum(shares.values())
        return MenuEntry(
            tuple(
                TreePolicy(tuple(SparseTree(*tree) for tree in trees))
                for trees in self.trees
            ),
            round(self.tau, 6),
            tuple((rows, shares[rows] / total) for rows in sorted(shares)),
        )

    @property
    def max_rows(self) -> int:
        return max(tree.num_rows for trees in self.trees for tree in trees)

    @property
    def mean_rows(self) -> float:
        rows = np.array([[tree.num_rows for tree in trees] for trees in self.trees])
        return float((rows * self.state_distribution).sum())


def node_chances(
    tree: PlainTree | SparseTree,
    acceptance: AcceptanceModel,
    state: int,
    match_class: int,
) -> np.ndarray:
    """[nodes] chance that verification reaches each node, root (1) first."""
    reached, depths, chain = [1.0], [0], [match_class > 0]
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        depths.append(depths[parent] + 1)
        chances = acceptance.probabilities(
            state, match_class, depths[-1], chain[parent]
        )
        chance = float(chances[rank]) if rank < len(chances) else 0.0
        chain.append(chain[parent] and rank == 0)
        reached.append(reached[parent] * chance)
    return np.array(reached)


def policy_value(
    trees: Trees,
    acceptance: AcceptanceModel,
    latency: LatencyCurve,
) -> tuple[float, float, np.ndarray]:
    """(tokens per step, tokens per second, [C + 1, m + 1] state distribution)."""
    return _value(_outcomes(trees, acceptance), acceptance, latency)


def best_policy(
    acceptance: AcceptanceModel,
    latency: LatencyCurve,
    max_rows: int,
    num_ept: int = 1,
    start: SearchedPolicy | None = None,
) -> SearchedPolicy:
    """The policy with the most tokens per second in the long run.

    Args:
        acceptance: chances of the candidates.
        latency: seconds of a step by the rows of one request.
        max_rows: most rows per step and request, root included, at least 1.
        num_ept: rows per prompt token.
        start: the policy of a similar search, to begin with.
    """
    m, classes = acceptance.num_prompt_tokens, acceptance.num_classes
    fitting = min(m, (max_rows - 1) // num_ept)
    bare = PlainTree((), (), (fitting,), num_ept)
    trees = [[bare] * (m + 1) for _ in range(classes)]
    if start is not None:
        trees = [list(row) for row in start.trees]
    cost = latency(np.arange(1, max_rows + 1))
    candidates = candidates_by_depth(acceptance)
    most = most_tokens(acceptance, candidates)
    steps = _outcomes(trees, acceptance)
    for _ in range(_MAX_ROUNDS):
        tokens, seconds, moves = _chain(steps, acceptance, latency)
        speed, flat = _relative_values(tokens, seconds, moves)
        h = flat.reshape(classes, m + 1)
        ahead = (1 - _RESTART) * acceptance.transitions @ h
        rows = useful_rows(most.ravel(), flat, speed, cost)
        best = TypedTrees(candidates, ahead, rows, num_ept)
        worth = 1 + best.values[..., 1:] - speed * cost[:rows]
        least = _TOLERANCE * (1 + np.abs(h).max())
        improved = np.argwhere(worth.max(axis=2) > h + 10 * least)
        if not len(improved):
            break
        for match_class, state in improved.tolist():
            here = worth[match_class, state]
            enough = int(np.argmax(here >= here.max() - least)) + 1
            tree = best.tree(match_class, state, enough)
            trees[match_class][state] = tree
            steps[match_class][state] = _outcome(tree, acceptance, state, match_class)
    chosen = tuple(tuple(row) for row in trees)
    return SearchedPolicy(chosen, *_value(steps, acceptance, latency))


class _Outcome(NamedTuple):
    """What a step with one tree brings."""

    tokens: float
    rows: int
    after: np.ndarray
    """[2, m + 1] chance to end at the root, or below it, by prompt tokens."""


def _outcome(
    tree: PlainTree | SparseTree,
    acceptance: AcceptanceModel,
    state: int,
    match_class: int,
) -> _Outcome:
    reached = node_chances(tree, acceptance, state, match_class)
    ends = reached.copy()
    np.subtract.at(ends, np.array(tree.parents, dtype=int), reached[1:])
    ends = np.maximum(ends, 0) / np.maximum(ends, 0).sum()
    after = np.zeros((2, acceptance.num_prompt_tokens + 1))
    after[0, tree.prompts[0]] = ends[0]
    after[1] = np.bincount(tree.prompts[1:], ends[1:], after.shape[1])
    return _Outcome(float(reached.sum()), tree.num_rows, after)


def _outcomes(trees: Trees, acceptance: AcceptanceModel) -> list[list[_Outcome]]:
    """[C + 1][m + 1] of every state."""
    return [
        [_outcome(tree, acceptance, state, each) for state, tree in enumerate(row)]
        for each, row in enumerate(trees)
    ]


def _chain(
    steps: Sequence[Sequence[_Outcome]],
    acceptance: AcceptanceModel,
    latency: LatencyCurve,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [S], seconds [S] and moves [S, S] of the states, class major."""
    tokens = np.array([step.tokens for row in steps for step in row])
    seconds = latency(np.array([step.rows for row in steps for step in row]))
    moves = np.stack(
        [
            (acceptance.transitions[:, match_class].T @ step.after).ravel()
            for match_class, row in enumerate(steps)
            for step in row
        ]
    )
    moves *= 1 - _RESTART
    moves[:, 0] += _RESTART
    return tokens, seconds, moves


def _value(
    steps: Sequence[Sequence[_Outcome]],
    acceptance: AcceptanceModel,
    latency: LatencyCurve,
) -> tuple[float, float, np.ndarray]:
    """The `policy_value` of trees whose steps are known."""
    tokens, seconds, moves = _chain(steps, acceptance, latency)
    size = len(tokens)
    system = np.vstack([(np.eye(size) - moves).T, np.ones(size)])
    share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    tau = float(share @ tokens)
    shape = (acceptance.num_classes, acceptance.num_prompt_tokens + 1)
    return tau, tau / float(share @ seconds), share.reshape(shape)


def _relative_values(
    tokens: np.ndarray, seconds: np.ndarray, moves: np.ndarray
) -> tuple[float, np.ndarray]:
    """Tokens per second g, and h with h[0] = 0: h = tokens - g seconds + moves h."""
    system = np.eye(len(tokens)) - moves
    system[:, 0] = seconds
    solution = np.linalg.solve(system, tokens)
    return float(solution[0]), np.append(0.0, solution[1:])
