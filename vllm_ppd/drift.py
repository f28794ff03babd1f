"""Traffic that is another than before, seen by how many guesses came true.

Counts that fade slowly serve traffic that stays; where it changes at once (another
temperature, another kind of text) they would hold on to what is no longer so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["drifted"]

# Shift of a source's log odds from which on traffic is another, and how many standard
# deviations of independent guesses that must be; those of one text are alike.
_SHIFT, _SURE = 0.7, 8.0


def drifted(
    tries: np.ndarray, hits: np.ndarray, believed: np.ndarray, firsts: Sequence[int]
) -> bool:
    """Whether some source was right far more or less often than was believed.

    Args:
        tries, hits: [places] guesses of late, and those that came true.
        believed: [places] chances, from before.
        firsts: [sources + 1] where each source begins, and how many places there are.
    """
    expected = tries * believed
    variances = expected * (1 - believed)
    for first, end in pairwise(firsts):
        surprise = abs(hits[first:end].sum() - expected[first:end].sum())
        variance = variances[first:end].sum()
        # The first is a step of Newton's method towards the shift.
        if surprise > max(_SHIFT * variance, _SURE * variance**0.5):
            return True
    return False
