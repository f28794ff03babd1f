"""N-gram drafts: what followed the request's last tokens earlier in its own context.

If a request's last tokens occur earlier in its context, the tokens after them are
likely to come again (prompt lookup decoding). The match is that of vLLM's n-gram
speculator: the longest one of at most 8 tokens, and of equally long ones the earliest.
"""

from __future__ import annotations

import numpy as np

# (fewest, most) tokens of a match in match class 1, 2, ...
LENGTHS = ((2, 3), (4, 8))
# Most tokens of an n-gram draft.
MAX_NGRAM_DRAFTS = 8


def match_ngram(context: np.ndarray) -> tuple[int, np.ndarray]:
    """The match class of a context, and its n-gram draft.

    Args:
        context: int [n] tokens of a request; the last one is the root.

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
    """`match_ngram` of a batch.

    Args:
        token_ids: int [B, ...] tokens of each request.
        ends: [B] how many they are.
        context: how many of a request's last tokens are searched.

    Returns:
        int64 [B] classes and [B, MAX_NGRAM_DRAFTS] tokens, -1 padded.
    """
    classes = np.zeros(len(ends), dtype=np.int64)
    drafts = np.full((len(ends), MAX_NGRAM_DRAFTS), -1)
    for index, end in enumerate(ends.tolist()):
        tokens = token_ids[index, max(0, end - context) : end]
        classes[index], draft = match_ngram(tokens)
        drafts[index, : len(draft)] = draft
    return classes, drafts


def _longest_match(context: np.ndarray, max_length: int) -> tuple[int, int]:
    """(length, end) of the longest match, of several the first; (0, 0) without one."""
    n = len(context)
    # Positions before which the context's last `length` tokens stand.
    positions = np.arange(1, n)
    longest, at = 0, 0
    for length in range(1, min(max_length, n - 1) + 1):
        positions = positions[positions >= length]
        positions = positions[context[positions - length] == context[n - length]]
        if not len(positions):
            break
        longest, at = length, int(positions[0])
    return longest, at
