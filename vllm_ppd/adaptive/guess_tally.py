"""What guesses have brought at one load: tokens and rows of many steps.

A comparison by the clock is short, for the machine's speed drifts, and with few
requests its steps all lie in two or three texts, which say little of the next ones. How
many tokens a step brings does not depend on the machine, and is seen in every step that
has guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_ppd.adaptive.speed_look import MeanStep

__all__ = ["GuessTally"]

# Steps of a request after which what was before counts half as much.
_MEMORY = 8192.0
# Steps of a request without which guesses are not given up: a dozen texts.
_ENOUGH = 1024.0
# Where guesses are further short than this, fewer will do.
_CLEAR = 0.15


@dataclass
class GuessTally:
    """Sums over steps with guesses, of all their requests.

    Attributes:
        steps: of one request.
        tokens, rows: that those brought and had.
    """

    steps: float = 0.0
    tokens: float = 0.0
    rows: float = 0.0

    def add(self, running: int, tokens: int, rows: int) -> None:
        """A step of so many requests."""
        self.steps += running
        self.tokens += tokens
        self.rows += rows
        if self.steps > _MEMORY:
            self.steps /= 2
            self.tokens /= 2
            self.rows /= 2

    def missing(self, short: float) -> float:
        """Steps of a request that are still to be seen before guesses are given up.

        short: of what they would have to bring, relative to plain decoding. What is
            far short takes fewer steps to see, by the square.
        """
        needed = _ENOUGH * min(1.0, (_CLEAR / max(short, _CLEAR)) ** 2)
        return max(0.0, needed - self.steps)

    def ratio(self, guessing: MeanStep, plain: MeanStep) -> float:
        """Tokens per second with guesses over those without.

        Args:
            guessing: steps with guesses, where the clock was read; how long all took
                follows from their own rows.
            plain: steps without, at about the same time.
        """
        seconds, usual = guessing.seconds, self.rows / self.steps
        extra = seconds - plain.seconds
        if guessing.rows > 1 and extra > 0:
            seconds = plain.seconds + extra * (usual - 1) / (guessing.rows - 1)
        return self.tokens / self.steps * plain.seconds / seconds
