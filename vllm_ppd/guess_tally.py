"""What guesses have brought at one load: tokens and rows of many steps.

A comparison by the clock is short, for the machine's speed drifts, and with few
requests its steps all lie in two or three texts, which say little of the next ones. How
many tokens a step brings does not depend on the machine, and is seen in every step that
has guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GuessTally"]

# Steps of a request after which what was before counts half as much.
_MEMORY = 8192.0
# Steps of a request without which guesses are not given up: several texts of one.
_ENOUGH = 512.0


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

    @property
    def missing(self) -> float:
        """Steps of a request that are still to be seen before guesses are given up."""
        return max(0.0, _ENOUGH - self.steps)

    def ratio(self, guessing: tuple[float, float], plain_s: float) -> float:
        """Tokens per second with guesses over those without.

        Args:
            guessing: seconds and rows per request of steps with guesses, where the
                clock was read; all steps' time follows from their own rows.
            plain_s: seconds of a step without, at about the same time.
        """
        seconds, rows = guessing
        usual = self.rows / self.steps
        if rows > 1.0 and seconds > plain_s:
            seconds = plain_s + (seconds - plain_s) * (usual - 1) / (rows - 1)
        return self.tokens / self.steps * plain_s / seconds
