"""Guesses for the next step: a tree's candidates from the prompt rows' outputs."""

from __future__ import annotations

import numpy as np

from vllm_ppd.tables import PolicyTables


def fill_drafts(
    tables: PolicyTables, states: np.ndarray, counts: np.ndarray, best: np.ndarray
) -> list[list[int]]:
    """Draft token ids of each request: its tree's rows after the root.

    The candidate at depth ``d`` and rank ``r`` is the rank-``r`` token of prompt
    token ``d``'s output; prompt rows get their soft ids.

    Args:
        states: [B] next state of each request.
        counts: [B] prompt tokens whose outputs are in ``best``, 0 where a request
            has none; otherwise equal to its state.
        best: [sum of counts, k] best token ids of each prompt token, best first,
            request by request.

    Returns:
        one list per request; the rows of its tree in order.
    """
    ids = tables.soft_ids[states]
    width = tables.parents.shape[1]
    # Depth 1 of request b is row firsts[b] of best.
    firsts = np.cumsum(counts) - counts
    rows = firsts[:, None] + tables.candidate_depths[states] - 1
    is_candidate = tables.parents[states] >= 0
    if is_candidate.any():
        tokens = best[np.where(is_candidate, rows, 0), tables.candidate_ranks[states]]
        ids[:, :width] = np.where(is_candidate, tokens, ids[:, :width])
    return [
        row[1:end]
        for row, end in zip(ids.tolist(), tables.num_rows[states], strict=True)
    ]
