"""What earlier matches would have guessed in text that was written without guesses.

Where nobody speculates no walk says how far a chain is right, nor which match class
follows which. But the text itself tells: from any place in it, the steps that chains
alone would have made can be made once more. As in speculation, a step begins where
the one before it ended, for passages that are easy to guess hold fewer steps than
tokens, and counting their tokens would promise too much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS, match_ngrams

__all__ = ["ReplayedSteps", "replay_chains"]

Match = Callable[
    [np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]
]  # as `suffix.match_ngrams`


class ReplayedSteps(NamedTuple):
    """Steps of several requests, in no order."""

    classes: np.ndarray
    """[N] match class of each step."""
    accepted: np.ndarray
    """[N] tokens of the chain that were right."""
    lengths: np.ndarray
    """[N] tokens of the chain."""
    after: np.ndarray
    """[N] match class of the next step of the request."""


def replay_chains(
    token_ids: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    context: int,
    settling: int,
    steps: int,
    match: Match = match_ngrams,
) -> ReplayedSteps:
    """Make the steps of each request from `starts` on, as long as its text says what
    came of them.

    Args:
        token_ids: int [B, ...] tokens of each request.
        starts, ends: [B] tokens that were known when the first step began, and now.
        context: most tokens of a request in which matches are looked for.
        settling: first steps that are not counted; `starts` may be anywhere, and later
            steps begin where steps do.
        steps: most steps of a request after those.
        match: how matches are found.
    """
    batch = np.arange(len(ends))
    ahead = np.arange(MAX_NGRAM_DRAFTS)
    last = token_ids.shape[1] - 1
    at = starts.astype(np.int64)
    classes, chains = match(token_ids, at, context)
    found: list[tuple[np.ndarray, ...]] = []
    for number in range(settling + steps):
        # Whole chains and the token after them, or how far they are right is unknown.
        known = at + MAX_NGRAM_DRAFTS < ends
        if not known.any():
            break
        written = token_ids[batch[:, None], np.minimum(at[:, None] + ahead, last)]
        right = np.cumprod(chains == written, axis=1).sum(axis=1)
        at = np.where(known, at + right + 1, at)
        before, lengths = classes, (chains >= 0).sum(axis=1)
        classes, chains = match(token_ids, at, context)
        if number >= settling:
            counted = (before, right, lengths, classes)
            found.append(tuple(each[known] for each in counted))
    if not found:
        return ReplayedSteps(*(np.zeros(0, dtype=np.int64),) * 4)
    return ReplayedSteps(*map(np.concatenate, zip(*found, strict=True)))
