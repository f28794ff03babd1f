"""Where the steps of decoding begin in a text that is known.

A step that guesses well skips what it guessed, so a passage that is easy to guess holds
fewer steps than tokens. Rates over all tokens therefore promise more tokens per step
than decoding gets; rates over the tokens at which steps begin do not.
"""

from __future__ import annotations

import numpy as np

from vllm_ppd.suffix import MAX_CHAIN

__all__ = ["advance_chances", "step_starts"]

# Chance that a step goes on past its first, second and third token where no chain
# helps: typical of prompt tokens; only where steps begin depends on it.
_GUESSED = (0.5, 0.4, 0.3)


def advance_chances(right: np.ndarray) -> np.ndarray:
    """Chance of each number of tokens that a step brings.

    Args:
        right: int [n] tokens of the chain that are right in a step at each position,
            0 where the first one is wrong or there is no chain.

    Returns:
        [n, MAX_CHAIN + 2]; column k is k tokens.
    """
    chances = np.zeros((len(right), MAX_CHAIN + 2))
    chances[np.arange(len(right)), right + 1] = 1.0
    goes_on = np.cumprod((1.0, *_GUESSED))
    ends = goes_on - np.append(goes_on[1:], 0.0)
    chances[right == 0] = 0.0
    chances[right == 0, 1 : 1 + len(ends)] = ends
    return chances


def step_starts(chances: np.ndarray) -> np.ndarray:
    """[n] chance that a step begins at each position, the first one (1) included.

    chances: of `advance_chances`.
    """
    count, most = chances.shape
    begins = np.zeros(count + most)
    begins[0] = 1.0
    for at in range(count):
        begins[at : at + most] += begins[at] * chances[at]
    return begins[:count]
