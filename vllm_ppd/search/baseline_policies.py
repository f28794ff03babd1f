"""Policies to compare the search with: the paper's own, chains, full and random trees.

Each picks its sizes for the most tokens per step at a given number of rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_value import Chain, evaluate, step_outcome
from vllm_ppd.search.tree_search import SearchError, check_count, optimal_policy
from vllm_ppd.trees.plain_tree import PlainTree, arrange, as_policy, path_probabilities
from vllm_ppd.trees.tree import TreePolicy

__all__ = [
    "BaselineKind",
    "baseline_trees",
    "chain_policy",
    "full_policy",
    "paper_policy",
    "random_policy",
]

BaselineKind = Literal["paper", "chain", "full", "random"]

_CONSTANT = LatencyCurve.constant()
_MAX_ROUNDS = 10


def paper_policy(stats: AcceptanceStats, rows: int, num_ept: int = 1) -> TreePolicy:
    """The published dynamic sparse tree within `rows` rows, all of them counted.

    The root keeps m prompt tokens. The candidates of state s are its most probable
    paths, each with m prompt tokens at first. Then the prompt token of least loss,
    residual(v) * (f(T_k) - f(T_{k-1})) for the k-th on node v, is removed until the
    tree fits, but one stays on every node, as in the authors' trees. The number of
    candidates of each state is chosen for the most tokens per step.

    Raises SearchError for `rows` or `num_ept` below 1 or absurd, TreeError for more
    rows than can be served (`baseline_trees` has no such limit).
    """
    return as_policy(baseline_trees("paper", stats, rows, num_ept))


def chain_policy(stats: AcceptanceStats, rows: int, num_ept: int = 1) -> TreePolicy:
    """The best policy among those with one candidate per depth, the likeliest.

    Errors as `paper_policy`.
    """
    return as_policy(baseline_trees("chain", stats, rows, num_ept))


def full_policy(stats: AcceptanceStats, rows: int, num_ept: int = 1) -> TreePolicy:
    """Trees in which all nodes but the deepest have as many children.

    All nodes of all trees have as many prompt tokens. That number, and the width and
    depth of each tree, are those of the most tokens per step among the trees that fit.
    Errors as `paper_policy`.
    """
    return as_policy(baseline_trees("full", stats, rows, num_ept))


def random_policy(
    stats: AcceptanceStats, rows: int, num_ept: int = 1, seed: int = 0
) -> TreePolicy:
    """As many candidates and prompt tokens as `paper_policy`, placed at random.

    The same `seed` gives the same policy; errors as `paper_policy`.
    """
    return as_policy(baseline_trees("random", stats, rows, num_ept, seed))


def baseline_trees(
    kind: BaselineKind,
    stats: AcceptanceStats,
    rows: int,
    num_ept: int = 1,
    seed: int = 0,
) -> tuple[PlainTree, ...]:
    """[m + 1] the trees of a named alternative, also beyond what can be served.

    `seed` is for random trees only. Raises SearchError for an unknown kind, and for
    `rows` or `num_ept` outside 1 to 1024.
    """
    if kind not in get_args(BaselineKind):
        raise SearchError(f"kind is {kind!r}; choose one of {get_args(BaselineKind)}")
    check_count("rows", rows)
    check_count("num_ept", num_ept)
    table = stats.acceptance
    trees: Sequence[PlainTree]
    if kind == "chain":
        trees = _chains(table, rows, num_ept)
    elif kind == "full":
        trees = _full_trees(table, rows, num_ept)
    else:
        trees = _paper_trees(stats, rows, num_ept)
    if kind == "random":
        trees = [_scrambled(s, t, table, [seed, s]) for s, t in enumerate(trees)]
    return tuple(
        arrange(tree, path_probabilities(tree.parents, tree.ranks, table))
        for tree in trees
    )


def _chains(table: np.ndarray, rows: int, num_ept: int) -> Sequence[PlainTree]:
    """The best policy when no node has more than its best child."""
    best = table.argmax(axis=1)[:, None]
    only = np.zeros_like(table)
    np.put_along_axis(only, best, np.take_along_axis(table, best, axis=1), axis=1)
    return optimal_policy(AcceptanceStats(only), _CONSTANT, rows, num_ept).trees


def _likeliest_paths(state: int, table: np.ndarray, rows: int) -> PlainTree:
    """The `rows` most probable paths of depth <= state, the likeliest first."""
    ranked = np.argsort(-table, axis=1, kind="stable").tolist()
    parents: list[int] = []
    ranks: list[int] = []
    # (minus path probability, tie break, parent, parent's probability, depth, place
    # among its siblings); a node's next sibling and first child follow it.
    heap = [(0.0, 0, 0, 1.0, 0, 0)] if state and table[0].any() else []
    while heap and len(parents) < rows:
        _, _, parent, above, depth, place = heapq.heappop(heap)
        node = len(parents) + 1
        here = above * table[depth, ranked[depth][place]]
        parents.append(parent)
        ranks.append(ranked[depth][place])
        following = []
        if place + 1 < len(ranked[depth]):
            following.append((parent, above, depth, place + 1))
        if depth + 1 < state:
            following.append((node, here, depth + 1, 0))
        for number, (up, reach, level, index) in enumerate(following):
            chance = reach * table[level, ranked[level][index]]
            if chance > 0:
                tie = 2 * node + number
                heapq.heappush(heap, (-chance, tie, up, reach, level, index))
    return PlainTree(tuple(parents), tuple(ranks), (0,) * (len(parents) + 1))


def _paper_trees(
    stats: AcceptanceStats, rows: int, num_ept: int
) -> Sequence[PlainTree]:
    """For each state its likeliest paths, how many of them by policy iteration.

    The number of accepted candidates of every tree enters into the choice of prompt
    tokens in all trees, so that rounds may get stuck: several starts are made.
    """
    table = stats.acceptance
    orders = [_likeliest_paths(s, table, rows) for s in range(len(table) + 1)]
    reached = [
        path_probabilities(order.parents, order.ranks, table) for order in orders
    ]
    best: tuple[float, Sequence[PlainTree]] = (0.0, ())
    for prompts_each in range(len(table) + 1):
        size = max(0, rows - 1 - num_ept * len(table)) // (1 + num_ept * prompts_each)
        accepted = np.array([chances[1 : 1 + size].sum() for chances in reached])
        values = accepted
        for _ in range(_MAX_ROUNDS):
            trees = []
            for order in orders:
                options = _pruned_trees(order, accepted, table, rows, num_ept)
                steps = [step_outcome(tree, table, len(orders)) for tree in options]
                worth = [tokens + moves @ values for tokens, moves in steps]
                trees.append(options[int(np.argmax(worth))])
            tau = evaluate(trees, stats, _CONSTANT).tau
            if tau > best[0]:
                best = tau, trees
            chain = Chain.of(trees, table, _CONSTANT)
            if np.array_equal(accepted, chain.tokens - 1):
                break
            accepted = chain.tokens - 1
            # Least squares, because a chain may have several recurrent classes.
            system = np.eye(len(orders)) - chain.moves
            values = np.linalg.lstsq(system, chain.tokens - tau, rcond=None)[0]
    return best[1]


def _pruned_trees(
    order: PlainTree, accepted: np.ndarray, table: np.ndarray, rows: int, num_ept: int
) -> list[PlainTree]:
    """Trees of the first 0, 1, 2, ... candidates, each with the prompts that fit.

    accepted: [m + 1] f of the trees that the prompt tokens lead to.
    """
    on_root = min(len(table), (rows - 1) // num_ept)
    budget = rows - 1 - num_ept * on_root
    reached = path_probabilities(order.parents, order.ranks, table)
    # A prompt token can only go after those behind it on its node, so it goes when
    # the largest loss among them is the least one there is.
    loss = np.maximum.accumulate(np.diff(accepted)[::-1])[::-1]
    loss[0] = np.inf
    trees = []
    for count in range(min(len(order.parents), budget // (1 + num_ept)) + 1):
        parents = np.array(order.parents[:count], dtype=int)
        residual = reached[: count + 1].copy()
        np.subtract.at(residual, parents, reached[1 : count + 1])
        # A tiny floor: on a node where verification never ends, inf * 0 is no number.
        losses = loss[:, None] * np.maximum(residual[1:], 1e-300)  # [m, count]
        kept = np.argsort(-losses, axis=None, kind="stable")
        kept = kept[: (budget - count) // num_ept]
        prompts = np.bincount(kept % max(count, 1), minlength=count)[:count]
        plain = order._replace(parents=order.parents[:count], num_ept=num_ept)
        trees.append(
            plain._replace(
                ranks=order.ranks[:count], prompts=(on_root, *prompts.tolist())
            )
        )
    return trees


def _full_trees(table: np.ndarray, rows: int, num_ept: int) -> list[PlainTree]:
    """The best uniform tree of each state, all with as many prompt tokens per node.

    Every step then ends in the same state, the one whose tree decides.
    """
    best: tuple[float, list[PlainTree]] = (0.0, [])
    for prompts in range(len(table) + 1):
        limit = rows // (1 + num_ept * prompts)
        if not limit:
            break
        options = [_uniform_tree(table[:0], 0, prompts, num_ept)]
        trees = []
        tokens = 0.0
        for state in range(len(table) + 1):
            for width in range(1, table.shape[1] + 1 if state else 1):
                if sum(width**depth for depth in range(state + 1)) > limit:
                    break
                options.append(_uniform_tree(table[:state], width, prompts, num_ept))
            sums = [
                path_probabilities(t.parents, t.ranks, table).sum() for t in options
            ]
            trees.append(options[int(np.argmax(sums))])
            if state == prompts:
                tokens = max(sums)
        if tokens > best[0]:
            best = tokens, trees
    return best[1]


def _uniform_tree(
    table: np.ndarray, width: int, prompts: int, num_ept: int
) -> PlainTree:
    """The `width` best children under every node, as deep as `table` has rows."""
    parents: list[int] = []
    ranks: list[int] = []
    level = [0]
    for best in np.argsort(-table, axis=1, kind="stable")[:, :width].tolist():
        first = len(parents) + 1
        parents += [parent for parent in level for _ in best]
        ranks += [rank for _ in level for rank in best]
        level = list(range(first, len(parents) + 1))
    counts = (prompts,) * (len(parents) + 1)
    return PlainTree(tuple(parents), tuple(ranks), counts, num_ept)


def _scrambled(
    state: int, tree: PlainTree, table: np.ndarray, seed: list[int]
) -> PlainTree:
    """As many candidates and prompt tokens as `tree`, anywhere below the root."""
    random = np.random.default_rng(seed)
    num_ranks = table.shape[1]
    depths = [0]
    parents: list[int] = []
    ranks: list[int] = []
    open_places = [(0, rank) for rank in range(num_ranks)]
    while len(parents) < len(tree.parents):
        parent, rank = open_places.pop(int(random.integers(len(open_places))))
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
        if depths[-1] < state:
            open_places += [(len(parents), rank) for rank in range(num_ranks)]
    slots = np.repeat(np.arange(len(parents)), len(table))
    drawn = random.choice(slots, sum(tree.prompts[1:]), replace=False)
    prompts = np.bincount(drawn, minlength=len(parents)).tolist()
    return PlainTree(
        tuple(parents), tuple(ranks), (tree.prompts[0], *prompts), tree.num_ept
    )
