"""What long contexts do to a step's time, and which ranges of contexts to tell apart.

Attention reads every token of a request's context once per step, for all of its rows
together, and computes with it once per row. So a step's time grows by so much per token
of context and request, and by so much per row: three numbers, for plain steps run
another kernel than trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ContextBand", "ContextCost", "ContextSample", "context_bands"]

# Mean tokens of the running requests up to which contexts are told apart, and what a
# range of them is searched for, about its middle.
_LIMITS = (512, 2048, 8192)
_MIDDLES = (1024, 4096, 16384)


class ContextSample(NamedTuple):
    """How much longer a step takes per token of context that each request has more."""

    requests: int
    rows: int
    """Per request; 1 is a plain step."""
    seconds: float


@dataclass(frozen=True)
class ContextCost:
    """Seconds per token of context and request; raises ValueError for negative ones.

    Attributes:
        context: tokens per request that the steps had to which this is added.
        plain: in a plain step.
        tree: in a step with guesses, whatever its rows.
        row: there, for each row.
    """

    context: int
    plain: float
    tree: float
    row: float

    def __post_init__(self) -> None:
        if isinstance(self.context, bool) or not int(self.context) >= 1:
            raise ValueError(f"context is {self.context!r}; expected 1 or more tokens")
        for name in ("plain", "tree", "row"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r} s; expected 0 or more")

    @classmethod
    def fitted(cls, context: int, samples: Sequence[ContextSample]) -> ContextCost:
        """The costs by which `samples` differ least, in squares.

        samples: of plain steps and of some with guesses, those at one number of rows
            at least.
        """
        plain = np.array([s for s in samples if s.rows == 1])
        trees = np.array([s for s in samples if s.rows > 1])
        # [S, 2] what one second per token of each kind would come to.
        unit = np.stack([trees[:, 0], trees[:, 0] * trees[:, 1]], axis=1)
        tree, row = _least_squares(unit, trees[:, 2])
        return cls(
            context,
            max(0.0, float(plain[:, 0] @ plain[:, 2] / (plain[:, 0] @ plain[:, 0]))),
            tree,
            row,
        )

    def added(
        self, requests: Sequence[int], rows: Sequence[int], context: int
    ) -> np.ndarray:
        """[R, Q] seconds that contexts of so many tokens add; 0 for shorter ones."""
        count = np.array(rows)
        each = np.where(count == 1, self.plain, self.tree + self.row * count)
        return np.outer(requests, each) * max(0, context - self.context)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ContextBand(NamedTuple):
    """A range of mean contexts that has trees of its own where that pays."""

    limit: int | None
    """Its longest; None for any."""
    context: int
    """What its trees are searched for."""


def context_bands(cost: ContextCost | None, longest: int) -> list[ContextBand]:
    """The ranges that a server's requests can come into.

    Args:
        cost: where it is not known, contexts are not told apart.
        longest: most tokens of a request.
    """
    if cost is None or longest <= _LIMITS[0]:
        return [ContextBand(None, 1)]
    within = [limit for limit in _LIMITS if limit < longest]
    middles = [1, *_MIDDLES[: len(within)]]
    middles[-1] = min(middles[-1], longest)
    return [
        ContextBand(limit, middle)
        for limit, middle in zip([*within, None], middles, strict=True)
    ]


def _least_squares(unit: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """The two numbers from 0 up by which unit @ numbers is nearest to `seconds`."""
    both = np.linalg.lstsq(unit, seconds, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    # The best has a zero in it, if the best of all is out of bounds.
    found = []
    for kept in (0, 1):
        numbers = np.zeros(2)
        column = unit[:, kept]
        numbers[kept] = max(0.0, float(column @ seconds / (column @ column)))
        found.append((float(np.square(unit @ numbers - seconds).sum()), numbers))
    best = min(found, key=lambda pair: pair[0])[1]
    return float(best[0]), float(best[1])
