"""How long a step takes: seconds as a function of the rows it feeds to the model.

The paper measures this curve per device and picks the size of its trees by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np

__all__ = ["LatencyCurve", "MeasurementError"]


class MeasurementError(ValueError):
    """Latencies that no step can have."""


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds per step, straight between the measured points, never falling.

    Raises MeasurementError unless the points start at one row, rise in rows, do not fall
    in seconds, and are finite and positive.
    """

    rows: tuple[int, ...]
    """Rows of each measured point, all of one request: root, candidates, prompts."""
    seconds: tuple[float, ...]
    """Seconds of a step with that many rows."""
    tail: float | None = None
    """Seconds per row beyond the last point. By default the mean cost per row of the
    last point, which is pessimistic: unmeasured rows must not look free."""
    plain: float | None = None
    """Seconds of a step without speculation; None where one row takes no longer for
    being part of a policy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(n) for n in self.rows))
        object.__setattr__(self, "seconds", tuple(float(t) for t in self.seconds))
        if not self.rows or len(self.rows) != len(self.seconds):
            raise MeasurementError(
                f"a latency curve of {len(self.rows)} row counts has "
                f"{len(self.seconds)} times; expected one time for each, at least one"
            )
        if self.rows[0] != 1:
            raise MeasurementError(
                f"the latency curve starts at {self.rows[0]} rows; measure a plain "
                "step of 1 row as well"
            )
        for before, after in pairwise(self.rows):
            if after <= before:
                raise MeasurementError(
                    f"the latency curve has {after} rows after {before}; sort the "
                    "points by rows and keep one for each"
                )
        for count, time in zip(self.rows, self.seconds, strict=True):
            if not (math.isfinite(time) and time > 0):
                raise MeasurementError(
                    f"a step of {count} rows takes {time:g} s; expected a positive time"
                )
        for index, (before_s, after_s) in enumerate(pairwise(self.seconds)):
            if after_s < before_s:
                raise MeasurementError(
                    f"{self.rows[index + 1]} rows take {after_s:g} s, less than "
                    f"{self.rows[index]} rows ({before_s:g} s); smooth the "
                    "measurement so that it never falls"
                )
        tail = self.seconds[-1] / self.rows[-1] if self.tail is None else self.tail
        if not (math.isfinite(tail) and tail >= 0):
            raise MeasurementError(
                f"the tail is {tail:g} s per row; expected a finite number, at least 0"
            )
        object.__setattr__(self, "tail", float(tail))
        plain = self.seconds[0] if self.plain is None else float(self.plain)
        if not 0 < plain <= self.seconds[0]:
            raise MeasurementError(
                f"a plain step takes {plain:g} s; expected more than 0 and at most the "
                f"{self.seconds[0]:g} s of a single row among guesses"
            )
        object.__setattr__(self, "plain", plain)

    @property
    def plain_s(self) -> float:
        """Seconds of a step without speculation."""
        assert self.plain is not None  # set in __post_init__
        return self.plain

    @classmethod
    def constant(cls, seconds: float = 1.0) -> LatencyCurve:
        """A step of any size takes as long: only tokens per step count."""
        return cls((1,), (seconds,), tail=0.0)

    @classmethod
    def linear(cls, first: float, per_row: float) -> LatencyCurve:
        """`first` seconds for one row, `per_row` for each further one."""
        return cls((1,), (first,), tail=per_row)

    @overload
    def __call__(self, rows: float) -> float: ...
    @overload
    def __call__(self, rows: np.ndarray) -> np.ndarray: ...

    def __call__(self, rows: float | np.ndarray) -> float | np.ndarray:
        """Seconds of a step with `rows` (one number, or an array of any shape).

        A mean number of rows has parts of a row, too.
        """
        assert self.tail is not None  # set in __post_init__
        count = np.asarray(rows)
        if count.size and count.min() < 1:
            raise MeasurementError(f"a step has at least 1 row, not {count.min()}")
        beyond = np.maximum(count - self.rows[-1], 0)
        time = np.interp(count, self.rows, self.seconds) + self.tail * beyond
        return time if count.ndim else float(time)
