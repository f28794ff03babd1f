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
    from vllm_ppd.engine import runner_v1, sampling

    original = sampling.walk_trees
    rng = np.random.default_rng(seed)
    table = stats.acceptance  # [m, K]

    def walk_trees(runner: Any, walk: Any, logits: Any) -> Any:
        tables, states = runner.drafter.tables, runner._ppd_step.states
        depths = tables.candidate_depths[states]  # [B, N]
        ranks = np.minimum(tables.candidate_ranks[states], table.shape[1] - 1)
        odds = table[np.maximum(depths, 1) - 1, ranks]
        descend = walk.descend

        def drawn(picked: np.ndarray) -> bool:
            children = (walk.parents == walk.nodes[:, None]) & (walk.tokens >= 0)
            reach = np.where(children, odds, 0.0).cumsum(axis=1)
            hit = (rng.random(len(picked))[:, None] < reach) & children
            chosen = np.take_along_axis(
                walk.tokens, hit.argmax(axis=1)[:, None], axis=1
            )[:, 0]
            # A token that no child has ends the walk.
            none = np.where(np.isin(picked, walk.tokens), 0, picked)
            return bool(descend(np.where(hit.any(axis=1), chosen, none)))

        walk.descend = drawn
        return original(runner, walk, logits)

    runner_v1.walk_trees = walk_trees
