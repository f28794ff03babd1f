"""The policy with the most tokens per second in the long run, by policy iteration.

The state of a request is its match class and num_prompted, how deep the prompt rows of
its last step reach. The tree of a state decides the tokens and the seconds of a step,
and the probabilities of the next state: a semi-Markov decision process. Each round
solves for the relative value h of every state, then takes each state's most valuable
tree for that h (`tree_dp`), until none improves. In `tree_dp`, h(k) is the mean of
h(k, c') over the next match class c'; that mean differs between the root, where a walk
that ends has accepted no draft token, and the nodes below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.tree_dp import BestTrees, probabilities_by_depth
from vllm_ppd.trees.menu import MenuEntry
from vllm_ppd.trees.tree import SparseTree, TreePolicy

# By match class and num_prompted.
Trees = Sequence[Sequence[SparseTree]]

# One step in so many is a request's first. Hence every state leads to every other one,
# whatever the trees are.
_RESTART = 1e-4
_TOLERANCE = 1e-9
_MAX_ROUNDS = 50


@dataclass(frozen=True)
class SearchedPolicy:
    """Trees by match class and num_prompted, and their value.

    Attributes:
        trees: [C + 1][m + 1].
        acceptance_length: mean tokens per step.
        tokens_per_second: of one request.
        shares: [C + 1, m + 1] share of the steps that are made in each state.
    """

    trees: tuple[tuple[SparseTree, ...], ...]
    acceptance_length: float
    tokens_per_second: float
    shares: np.ndarray

    def entry(self) -> MenuEntry:
        """As an entry of a tree menu; raises TreeError for trees of too many rows."""
        row_shares: dict[int, float] = {}
        for trees, shares in zip(self.trees, self.shares, strict=True):
            for tree, share in zip(trees, shares.tolist(), strict=True):
                # Least squares may return values just below 0.
                rows = tree.num_rows
                row_shares[rows] = row_shares.get(rows, 0) + max(0.0, share)
        total = sum(row_shares.values())
        return MenuEntry(
            tuple(TreePolicy(trees) for trees in self.trees),
            round(self.acceptance_length, 6),
            tuple((rows, row_shares[rows] / total) for rows in sorted(row_shares)),
        )

    @property
    def max_rows(self) -> int:
        return max(tree.num_rows for trees in self.trees for tree in trees)


def reach_probabilities(
    tree: SparseTree, model: AcceptanceModel, num_prompted: int, match_class: int
) -> np.ndarray:
    """[nodes] probability that verification reaches each node, root (1) first."""
    reached = [1.0]
    for node, (parent, rank) in enumerate(
        zip(tree.parents, tree.ranks, strict=True), start=1
    ):
        on_ngram = match_class > 0 and tree.ngram_path[parent]
        depth = tree.node_depths[node]
        ranks = model.probabilities(num_prompted, match_class, depth, on_ngram)
        probability = float(ranks[rank]) if rank < len(ranks) else 0.0
        reached.append(reached[parent] * probability)
    return np.array(reached)


def policy_value(
    trees: Trees, model: AcceptanceModel, latency: LatencyCurve
) -> tuple[float, float, np.ndarray]:
    """(acceptance length, tokens per second, [C + 1, m + 1] shares of the steps)."""
    tokens, seconds, transitions = _process(_outcomes(trees, model), model, latency)
    size = len(tokens)
    system = np.vstack([(np.eye(size) - transitions).T, np.ones(size)])
    shares = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    length = float(shares @ tokens)
    shape = model.num_classes, model.num_prompt_tokens + 1
    return length, length / float(shares @ seconds), shares.reshape(shape)


@dataclass(frozen=True)
class TreeFigures:
    """One tree of an entry, and what is expected of it.

    Attributes:
        match_class: 0 without an n-gram match.
        tree: the tree.
        share: part of the steps that are made with it.
        reached: [nodes] probability that verification reaches each, root (1) first.
    """

    match_class: int
    tree: SparseTree
    share: float
    reached: np.ndarray

    @property
    def acceptance_length(self) -> float:
        """Mean tokens of a step with this tree."""
        return float(self.reached.sum())


def entry_figures(entry: MenuEntry, model: AcceptanceModel) -> list[TreeFigures]:
    """The trees of an entry by falling share of the steps.

    model: with as many match classes as the entry has.
    """
    trees = [policy.trees for policy in entry.policies]
    shares = policy_value(trees, model, LatencyCurve.constant())[2]
    figures = [
        TreeFigures(
            match_class,
            tree,
            # Least squares may leave a hair below zero.
            max(0.0, float(shares[match_class, num_prompted])),
            reach_probabilities(tree, model, num_prompted, match_class),
        )
        for match_class, policy in enumerate(entry.policies)
        for num_prompted, tree in enumerate(policy.trees)
    ]
    return sorted(figures, key=lambda figure: -figure.share)


def best_policy(
    model: AcceptanceModel, latency: LatencyCurve, max_rows: int, num_ept: int = 1
) -> SearchedPolicy:
    """The policy with the most tokens per second in the long run.

    Args:
        model: acceptance probabilities.
        latency: seconds of a step by the rows of one request.
        max_rows: most rows per step and request, root included, at least 1.
        num_ept: rows per prompt token.
    """
    m, classes = model.num_prompt_tokens, model.num_classes
    fitting = min(m, (max_rows - 1) // num_ept)
    prompts_only = SparseTree((), (), (fitting,), num_ept)
    trees = [[prompts_only] * (m + 1) for _ in range(classes)]
    cost = latency(np.arange(1, max_rows + 1))
    depths = probabilities_by_depth(model)
    steps = _outcomes(trees, model)
    for _ in range(_MAX_ROUNDS):
        speed, flat = _relative_values(*_process(steps, model, latency))
        h = flat.reshape(classes, m + 1)
        ahead = (1 - _RESTART) * model.transitions @ h
        best = BestTrees(depths, ahead, max_rows, num_ept)
        worth = 1 + best.values[..., 1:] - speed * cost
        tolerance = _TOLERANCE * (1 + np.abs(h).max())
        improved = np.argwhere(worth.max(axis=2) > h + 10 * tolerance)
        if not len(improved):
            break
        for match_class, num_prompted in improved.tolist():
            here = worth[match_class, num_prompted]
            enough = int(np.argmax(here >= here.max() - tolerance)) + 1
            tree = best.tree(match_class, num_prompted, enough)
            trees[match_class][num_prompted] = tree
            steps[match_class][num_prompted] = _outcome(
                tree, model, num_prompted, match_class
            )
    chosen = tuple(tuple(row) for row in trees)
    return SearchedPolicy(chosen, *policy_value(chosen, model, latency))


class _Outcome(NamedTuple):
    """A step with one tree."""

    tokens: float
    rows: int
    after: np.ndarray
    """[2, m + 1] probability to end at the root, or below it, by prompt tokens."""


def _outcome(
    tree: SparseTree, model: AcceptanceModel, num_prompted: int, match_class: int
) -> _Outcome:
    reached = reach_probabilities(tree, model, num_prompted, match_class)
    ends = reached.copy()
    np.subtract.at(ends, np.array(tree.parents, dtype=int), reached[1:])
    ends = np.maximum(ends, 0) / np.maximum(ends, 0).sum()
    after = np.zeros((2, model.num_prompt_tokens + 1))
    after[0, tree.prompts[0]] = ends[0]
    after[1] = np.bincount(tree.prompts[1:], ends[1:], after.shape[1])
    return _Outcome(float(reached.sum()), tree.num_rows, after)


def _outcomes(trees: Trees, model: AcceptanceModel) -> list[list[_Outcome]]:
    """[C + 1][m + 1] of every state."""
    return [
        [
            _outcome(tree, model, num_prompted, match_class)
            for num_prompted, tree in enumerate(row)
        ]
        for match_class, row in enumerate(trees)
    ]


def _process(
    steps: Sequence[Sequence[_Outcome]], model: AcceptanceModel, latency: LatencyCurve
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [S], seconds [S] and transitions [S, S] of the states, class major."""
    tokens = np.array([step.tokens for row in steps for step in row])
    seconds = latency(np.array([step.rows for row in steps for step in row]))
    transitions = np.stack(
        [
            (model.transitions[:, match_class].T @ step.after).ravel()
            for match_class, row in enumerate(steps)
            for step in row
        ]
    )
    transitions *= 1 - _RESTART
    transitions[:, 0] += _RESTART
    return tokens, seconds, transitions


def _relative_values(
    tokens: np.ndarray, seconds: np.ndarray, transitions: np.ndarray
) -> tuple[float, np.ndarray]:
    """Tokens per second g, and relative values h.

    They solve h = tokens - g seconds + transitions h with h[0] = 0.
    """
    system = np.eye(len(tokens)) - transitions
    system[:, 0] = seconds
    solution = np.linalg.solve(system, tokens)
    return float(solution[0]), np.append(0.0, solution[1:])
