"""Speed at somebody else's acceptance: guesses are accepted by a table's odds.

The engine does all of its work, verification included, but which child a walk goes to
is drawn from published probabilities instead of read off the target's tokens. The text
is then nonsense; its length, the rows and the KV moves are what the table's model would
have had. This is for measuring only and lives outside the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_ppd.acceptance import AcceptanceStats


def replay_acceptance(stats: AcceptanceStats, seed: int = 0) -> None:
    """Make PPD's V1 runner in this process accept guesses as ``stats`` says."""
    from vllm_ppd.engine import sampling
    from vllm_ppd.verify import TreeWalk, kv_moves

    rng = np.random.default_rng(seed)
    table = stats.acceptance  # [m, K]

    def walk(step: Any, tokens: np.ndarray, picked: np.ndarray) -> Any:
        tables, states = step.tables, step.states
        depths = tables.candidate_depths[states]  # [B, N]
        ranks = np.minimum(tables.candidate_ranks[states], table.shape[1] - 1)
        odds = table[np.maximum(depths, 1) - 1, ranks]
        walked = TreeWalk(step, tokens)
        going_on = True
        while going_on:
            children = (walked.parents == walked.nodes[:, None]) & (walked.tokens >= 0)
            reach = np.where(children, odds, 0.0).cumsum(axis=1)
            hit = (rng.random(len(states))[:, None] < reach) & children
            chosen = np.take_along_axis(
                walked.tokens, hit.argmax(axis=1)[:, None], axis=1
            )[:, 0]
            # A token that no child has ends the walk.
            end = picked[walked.logit_rows]
            end = np.where(np.isin(end, walked.tokens), 0, end)
            going_on = walked.descend(np.where(hit.any(axis=1), chosen, end))
        return walked, *kv_moves(step, walked)

    sampling.walk_greedy_cpu = walk  # type: ignore[assignment]
