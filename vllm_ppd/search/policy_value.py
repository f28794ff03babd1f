"""What a policy is worth: its Markov chain over states, solved exactly.

A step in state s with tree T_s emits 1 + f(T_s) tokens in the mean, f being the sum
of the path probabilities, takes L(rows of T_s), and ends at node v with probability
residual(v) = P(v) - sum of P(children of v). The number of prompt tokens on v is the
next state (the paper's dynamic sparse tree). With pi the long-run distribution:

    tokens per step    tau = sum_s pi(s) (1 + f(T_s))
    tokens per second      = tau / sum_s pi(s) L(rows(T_s))

The authors' formula charges a lost step whenever nothing is accepted, though the
root's own prompt tokens are there to go on with; here they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.trees.plain_tree import TreeLike, path_probabilities
from vllm_ppd.trees.tree import TreePolicy

__all__ = [
    "Chain",
    "PolicyValue",
    "evaluate",
    "long_run",
    "relative_values",
    "step_outcome",
]

# What happens less often than this per step does not happen.
_NEVER = 1e-12


class PolicyValue(NamedTuple):
    """The long-run worth of a policy, for a request that starts in state 0."""

    tau: float
    """Mean tokens per step, at least 1."""
    tokens_per_second: float
    """Mean tokens per second of one request."""
    state_distribution: tuple[float, ...]
    """[m + 1] share of the steps that are made in each state."""


class Chain(NamedTuple):
    """The Markov reward process that a policy makes."""

    tokens: np.ndarray
    """[m + 1] mean tokens of a step in each state."""
    seconds: np.ndarray
    """[m + 1] time of a step in each state."""
    moves: np.ndarray
    """[m + 1, m + 1] probability of the next state (column) from each state (row)."""

    @classmethod
    def of(
        cls, trees: Sequence[TreeLike], acceptance: np.ndarray, latency: LatencyCurve
    ) -> Chain:
        """The chain of one tree per state under `acceptance` [m, K]."""
        steps = [step_outcome(tree, acceptance, len(trees)) for tree in trees]
        tokens = np.array([tokens for tokens, _ in steps])
        seconds = latency(np.array([tree.num_rows for tree in trees]))
        return cls(tokens, seconds, np.stack([moves for _, moves in steps]))


def step_outcome(
    tree: TreeLike, acceptance: np.ndarray, num_states: int
) -> tuple[float, np.ndarray]:
    """Mean tokens of a step, and [num_states] the chance of each next state.

    acceptance: [m, K], of the guesses that fill `tree`.
    """
    reached = path_probabilities(tree.parents, tree.ranks, acceptance)
    ends = reached.copy()
    np.subtract.at(ends, np.array(tree.parents, dtype=int), reached[1:])
    moves = np.bincount(tree.prompts, ends, num_states)
    # Rounding leaves a node with sure children a hair off zero; taken for a way out,
    # it would join states that no request ever moves between.
    moves[moves < _NEVER] = 0
    return float(reached.sum()), moves / moves.sum()


def long_run(moves: np.ndarray) -> np.ndarray:
    """[n, n] share of steps spent in each state (column) after starting in each (row).

    Exists for every chain, several recurrent classes and cycles included.
    """
    # Waiting half of the time keeps the shares and removes cycles; then squaring
    # reaches 2**60 steps, renormalised so that rounding does not build up.
    steps = (np.eye(len(moves)) + moves) / 2
    for _ in range(60):
        steps = steps @ steps
        steps /= steps.sum(axis=1, keepdims=True)
    return steps


def relative_values(chain: Chain) -> tuple[float, np.ndarray]:
    """Tokens per second g, and [m + 1] relative values h in tokens, h[0] = 0.

    h(s) says how many tokens more than from state 0 a request gets in the long run:
    h = tokens - g * seconds + moves @ h. Raises LinAlgError when the chain has more
    than one recurrent class, for then no single g exists.
    """
    system = np.eye(len(chain.tokens)) - chain.moves
    system[:, 0] = chain.seconds
    solution = np.linalg.solve(system, chain.tokens)
    return float(solution[0]), np.concatenate([[0.0], solution[1:]])


def evaluate(
    policy: TreePolicy | Sequence[TreeLike],
    stats: AcceptanceStats,
    latency: LatencyCurve,
) -> PolicyValue:
    """The exact value of a policy, or of one tree per state of any size.

    Raises ValueError when the policy goes deeper, or to lower ranks, than `stats`.
    """
    trees = policy.trees if isinstance(policy, TreePolicy) else tuple(policy)
    if len(trees) - 1 > stats.num_prompt_tokens:
        raise ValueError(
            f"the policy is for {len(trees) - 1} prompt tokens, but the acceptance "
            f"table has {stats.num_prompt_tokens}; use the table of the same prompts"
        )
    worst = max(max(tree.ranks, default=-1) for tree in trees)
    if worst >= stats.num_ranks:
        raise ValueError(
            f"the policy has a candidate of rank {worst}, but the acceptance table "
            f"ends at rank {stats.num_ranks - 1}; measure more ranks"
        )
    chain = Chain.of(trees, stats.acceptance, latency)
    share = long_run(chain.moves)[0]
    tau = float(share @ chain.tokens)
    return PolicyValue(tau, tau / float(share @ chain.seconds), tuple(share.tolist()))
