"""The policy with the most tokens per second, from acceptance and latency.

Which tree to use in which state is an average-reward semi-Markov decision problem:

    maximise  sum_s pi(s) (1 + f(T_s)) / sum_s pi(s) L(rows(T_s))

It is solved by policy iteration. Each round computes the tokens per second g and the
relative values h of the current trees (`policy_value`), then the tree of each state
that maximises 1 + f(T) + sum_v residual(v) h(k_v) - g L(rows(T)) (`tree_growth`,
exact). When no state can improve, the policy is optimal. With L constant this is the
paper's problem of the best dynamic sparse tree for a budget of rows; with a measured L
it also chooses the budget, for each state by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_value import (
    Chain,
    PolicyValue,
    evaluate,
    long_run,
    relative_values,
)
from vllm_ppd.search.subtrees import useful_rows
from vllm_ppd.search.tree_growth import BestTrees
from vllm_ppd.trees.plain_tree import PlainTree, as_policy
from vllm_ppd.trees.tree import MAX_ROWS, TreePolicy

__all__ = ["PolicyValue", "SearchError", "SearchResult", "evaluate", "optimal_policy"]

MAX_SEARCH_ROWS = 1024
# Gains below this many tokens, or part of h, are rounding and not worth a row.
_TOLERANCE = 1e-10
_MAX_ROUNDS = 100


class SearchError(ValueError):
    """A search that cannot be made; the message says what to change."""


@dataclass(frozen=True)
class SearchResult:
    """The best policy and what it is worth."""

    trees: tuple[PlainTree, ...]
    """[m + 1] one tree per state, of any size."""
    tau: float
    """Mean tokens per step, at least 1."""
    tokens_per_second: float
    """Mean tokens per second of one request."""
    state_distribution: tuple[float, ...]
    """[m + 1] share of the steps made in each state, after a start in state 0."""

    @cached_property
    def policy(self) -> TreePolicy:
        """The trees as they are served.

        Raises TreeError when the search was allowed more rows than vLLM runs, and
        used them.
        """
        return as_policy(self.trees)

    @property
    def rows(self) -> tuple[int, ...]:
        """[m + 1] rows of the tree of each state."""
        return tuple(tree.num_rows for tree in self.trees)

    @property
    def mean_rows(self) -> float:
        """Rows per step in the long run."""
        return float(np.dot(self.state_distribution, self.rows))


def optimal_policy(
    stats: AcceptanceStats,
    latency: LatencyCurve,
    max_rows: int = MAX_ROWS,
    num_ept: int = 1,
) -> SearchResult:
    """The policy with the most tokens per second in the long run.

    No policy of trees with at most `max_rows` rows (root included) is faster under
    the model of `policy_value`; no speculation at all is one of them. Among trees of
    equal worth the smaller is taken.

    Args:
        stats: acceptance measured with the same prompt tokens.
        latency: seconds of a step by the rows that one request feeds.
        max_rows: rows per step and request, 1 to 1024; what is served has at most 129.
        num_ept: rows per prompt token.

    Raises:
        SearchError: `max_rows` or `num_ept` out of range.
    """
    check_count("max_rows", max_rows)
    check_count("num_ept", num_ept)
    states = range(stats.num_prompt_tokens + 1)
    seconds = latency(np.arange(1, max_rows + 1))
    # By state, as if no guess were left out.
    tokens = np.cumsum([1.0, *np.cumprod(stats.acceptance.sum(axis=1))])
    fitting = min(stats.num_prompt_tokens, (max_rows - 1) // num_ept)
    trees = [_root_only(fitting, num_ept) for _ in states]
    for _ in range(_MAX_ROUNDS):
        chain = _single_class(trees, stats.acceptance, latency, num_ept)
        speed, h = relative_values(chain)
        rows = useful_rows(tokens, h, speed, seconds)
        best = BestTrees(stats.acceptance, h, rows, num_ept)
        worth = 1 + best.values[:, 1:] - speed * seconds[:rows]  # [m + 1, rows]
        most = worth.max(axis=1)
        least = _TOLERANCE * (1 + np.abs(h).max())
        improved = [state for state in states if most[state] > h[state] + least]
        if not improved:
            break
        for state in improved:
            enough = worth[state] >= most[state] - least / 10
            trees[state] = best.tree(state, int(np.argmax(enough)) + 1)
    return SearchResult(tuple(trees), *evaluate(trees, stats, latency))


def check_count(name: str, value: object) -> None:
    """Raise SearchError unless `value` is an integer that a search can handle."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        what = f"is {value!r}"
    elif not 1 <= value <= MAX_SEARCH_ROWS:
        what = f"is {value}"
    else:
        return
    raise SearchError(f"{name} {what}; expected an integer from 1 to {MAX_SEARCH_ROWS}")


def _root_only(prompts: int, num_ept: int) -> PlainTree:
    return PlainTree((), (), (prompts,), num_ept)


def _single_class(
    trees: list[PlainTree],
    acceptance: np.ndarray,
    latency: LatencyCurve,
    num_ept: int,
) -> Chain:
    """The chain of `trees`, after making every state lead to the fastest class.

    A policy may settle in one of several sets of states, each with its own speed; h
    exists only where there is one set. One step with a bare root reaches any state,
    so the states that would miss the fastest set take that step (in place).
    """
    chain = Chain.of(trees, acceptance, latency)
    share = long_run(chain.moves)
    speed = (share @ chain.tokens) / (share @ chain.seconds)
    recurrent = np.flatnonzero(np.diag(share) > _TOLERANCE)
    fastest = share[recurrent[np.argmax(speed[recurrent])]] > _TOLERANCE
    missing = np.flatnonzero(share[:, fastest].sum(axis=1) < 1 - 1e-9)
    if not len(missing):
        return chain
    for state in missing.tolist():
        trees[state] = _root_only(int(np.argmax(fastest)), num_ept)
    return Chain.of(trees, acceptance, latency)
