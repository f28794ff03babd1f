"""Suffix evidence: what followed the last time these tokens were written.

Where the last tokens of a request occur earlier in its own context, what came after
them is likely to come again (prompt lookup, n-gram speculation). The match is that of
vLLM's n-gram speculator: the longest one of at most `max_length` tokens, and of equally
long ones the earliest.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LENGTHS", "MAX_NGRAM_DRAFTS", "match_chain", "match_ngrams"]

# Match classes 1, 2, ...: a match of at least so many tokens, up to the next entry's.
LENGTHS = ((2, 3), (4, 8))
# Tokens of a continuation that are looked at.
MAX_NGRAM_DRAFTS = 8


def match_chain(context: np.ndarray) -> tuple[int, np.ndarray]:
    """The match class of a context and the tokens that should come next.

    Args:
        context: int [n] tokens of a request, the last one is the root.

    Returns:
        (class, tokens): class 0 and no tokens without a match, else at most
        `MAX_NGRAM_DRAFTS` tokens, at least one.
    """
    longest, at = _longest_match(context, LENGTHS[-1][1])
    for match_class, (low, high) in enumerate(LENGTHS, start=1):
        if low <= longest <= high:
            return match_class, context[at : at + MAX_NGRAM_DRAFTS]
    return 0, context[:0]


def match_ngrams(
    token_ids: np.ndarray, ends: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """`match_chain` of a batch.

    Args:
        token_ids: int [B, ...] tokens of each request.
        ends: [B] how many they are.
        context: most tokens of a request that are looked at, its last ones.

    Returns:
        int64 [B] classes and [B, MAX_NGRAM_DRAFTS] tokens, -1 padded.
    """
    classes = np.zeros(len(ends), dtype=np.int64)
    chains = np.full((len(ends), MAX_NGRAM_DRAFTS), -1)
    for index, end in enumerate(ends.tolist()):
        tokens = token_ids[index, max(0, end - context) : end]
        classes[index], chain = match_chain(tokens)
        chains[index, : len(chain)] = chain
    return classes, chains


def _longest_match(context: np.ndarray, max_length: int) -> tuple[int, int]:
    """(length, end) of the earliest longest earlier match; (0, 0) if there is none."""
    n = len(context)
    # run[e]: how many tokens before position e match those before the end.
    alive = np.arange(1, n)
    longest, at = 0, 0
    for length in range(1, min(max_length, n - 1) + 1):
        alive = alive[alive >= length]
        alive = alive[context[alive - length] == context[n - length]]
        if not len(alive):
            break
        longest, at = length, int(alive[0])
    return longest, at
