"""Where the steps of decoding begin in a text that is known.

A step that guesses well skips what it guessed, and the next one begins behind a guess
that failed. Passages that are easy to guess therefore hold fewer steps than tokens, and
steps begin where the text has just been hard to guess. Rates over all tokens promise
more tokens per step than decoding gets; rates over the tokens at which steps begin do
not.
"""

from __future__ import annotations

import numpy as np

__all__ = ["step_starts"]

# Walks begin at so many places, and have forgotten where once they are past these.
_BURN_IN = 8


def step_starts(advances: np.ndarray) -> np.ndarray:
    """[n] how often a step begins at each of n neighbouring tokens.

    Mean of walks that begin at each of the first places, which are not counted
    themselves.

    Args:
        advances: [n] tokens that a step which begins there brings, at least 1.
    """
    count = len(advances)
    burn_in = min(_BURN_IN, count // 2)
    begins = np.zeros(count)
    begins[: max(1, burn_in)] = 1 / max(1, burn_in)
    for at, advance in enumerate(advances.tolist()):
        if at + advance < count:
            begins[at + advance] += begins[at]
    begins[:burn_in] = 0
    return begins
