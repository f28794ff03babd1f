"""What an engine wrote: tokens by step and request, and the figures they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Batch", "Generation", "Step"]


@dataclass(frozen=True)
class Step:
    """What one engine step brought to one request."""

    at_s: float
    """When, counted from the start of the batch."""
    ids: tuple[int, ...]
    guessed: str
    """Text of the tokens that were guessed ahead and accepted."""
    own: str
    """Text of the token that the model chose in this step."""


@dataclass(frozen=True)
class Generation:
    """What one request got, step by step; steps without tokens are left out."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, records: Sequence[Sequence[Any]]) -> Generation:
        """From the worker's records; drops those that brought no token."""
        return cls(
            tuple(
                Step(at, tuple(ids), guessed, own)
                for at, ids, guessed, own in records
                if ids
            )
        )

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for step in self.steps for i in step.ids)

    @property
    def text(self) -> str:
        return "".join(step.guessed + step.own for step in self.steps)

    @property
    def seconds(self) -> float:
        """From the start of the batch to this request's last token."""
        return self.steps[-1].at_s if self.steps else 0.0

    @property
    def tokens_per_s(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Acceptance length: tokens per decode step, 1 without speculation.

        The first step is left out: it reads the prompt and brings one token always.
        """
        steps = len(self.steps) - 1
        return (len(self.ids) - len(self.steps[0].ids)) / steps if steps > 0 else 1.0

    @property
    def repeated(self) -> float:
        """Share of the text's 4-grams that occurred in it before: 1 for a long loop.

        Small models loop when decoded greedily, and a loop is easy to guess: speed
        means little where this is high.
        """
        ids = self.ids
        grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Batch:
    """One measured run of several requests."""

    wall_s: float
    engine_steps: int
    requests: tuple[Generation, ...]
    full: tuple[float, int] | None = None
    """Seconds and tokens as long as a request that finished was followed by another:
    later fewer and fewer are running."""

    @property
    def tokens(self) -> int:
        return sum(len(request.ids) for request in self.requests)
