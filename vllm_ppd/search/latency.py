"""Step latency: seconds of a step by its rows, and by how many requests share it.

A `LatencyCurve` is the paper's hardware curve, for one load. A `LatencyProfile` holds
the curves of all loads, as measured through the real engine; it is kept in the user's
cache folder under a key of everything that changes it: model, data type, quantisation,
device, parallelism, versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from vllm_ppd.files import check_content, read_json, write_json
from vllm_ppd.trees.menu import MenuEntry

__all__ = [
    "LatencyCurve",
    "LatencyProfile",
    "MeasurementError",
    "cache_file",
    "expected_speedup",
]

FORMAT = "ppd_latency_profile"
FORMAT_VERSION = 1
_KEYS = ("key", "num_running", "rows", "seconds")
_REMEDY = "measure again with vllm-ppd profile"


class MeasurementError(ValueError):
    """Latencies or acceptance probabilities that cannot be."""


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds per step, straight between the measured points, never falling.

    Raises:
        MeasurementError: unless the points start at one row, rise in rows, do not fall
            in seconds, and are finite and positive.
    """

    rows: tuple[int, ...]
    """Rows of each measured point, all of one request: root, draft tokens, prompts."""
    seconds: tuple[float, ...]
    """Seconds of a step with that many rows."""
    tail: float | None = None
    """Seconds per row beyond the last point. By default the mean cost per row of the
    last point, which is pessimistic: unmeasured rows must not look free."""

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
        for left, right in pairwise(self.rows):
            if right <= left:
                raise MeasurementError(
                    f"the latency curve has {right} rows after {left}; sort the "
                    "points by rows and keep one for each"
                )
        for count, time in zip(self.rows, self.seconds, strict=True):
            if not (math.isfinite(time) and time > 0):
                raise MeasurementError(
                    f"a step of {count} rows takes {time:g} s; expected a positive time"
                )
        for index, (first, second) in enumerate(pairwise(self.seconds)):
            if second < first:
                raise MeasurementError(
                    f"{self.rows[index + 1]} rows take {second:g} s, less than "
                    f"{self.rows[index]} rows ({first:g} s); smooth the "
                    "measurement so that it never falls"
                )
        tail = self.seconds[-1] / self.rows[-1] if self.tail is None else self.tail
        if not (math.isfinite(tail) and tail >= 0):
            raise MeasurementError(
                f"the tail is {tail:g} s per row; expected a finite number, at least 0"
            )
        object.__setattr__(self, "tail", float(tail))

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


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds per step on one machine; raises MeasurementError for impossible tables.

    Attributes:
        num_running: [R] requests in the step, rising from 1.
        rows: [Q] rows per request, rising from 1, which is a plain step.
        seconds: [R][Q].
        key: what it was measured on.
    """

    num_running: tuple[int, ...]
    rows: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    key: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("num_running", "rows"):
            values = tuple(int(n) for n in getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or values[0] != 1 or list(values) != sorted(set(values)):
                raise MeasurementError(
                    f"{name} of a profile are {list(values)}; expected rising from 1"
                )
        table = tuple(tuple(float(t) for t in row) for row in self.seconds)
        object.__setattr__(self, "seconds", table)
        shape = len(self.num_running), len(self.rows)
        if {len(row) for row in table} != {shape[1]} or len(table) != shape[0]:
            raise MeasurementError(
                f"seconds has rows of {[len(row) for row in table]} times; expected "
                f"{shape[0]} rows of {shape[1]}"
            )
        array = np.array(table)
        if not (np.isfinite(array) & (array > 0)).all():
            raise MeasurementError("seconds must be finite and positive")

    @classmethod
    def smoothed(
        cls,
        num_running: Sequence[int],
        rows: Sequence[int],
        seconds: np.ndarray,
        key: Mapping[str, Any],
    ) -> LatencyProfile:
        """From raw measurements [R, Q]: more rows or requests never look faster.

        A pool-adjacent-violators pass along the rows, then along the requests, averages
        neighbours that are out of order.
        """
        table = np.array([_rising(row) for row in seconds])
        table = np.array([_rising(column) for column in table.T]).T
        return cls(tuple(num_running), tuple(rows), tuple(map(tuple, table)), key)

    def curve(self, num_running: int) -> LatencyCurve:
        """Seconds by rows per request while so many requests run."""
        table = np.array(self.seconds)
        loads = np.array(self.num_running)
        at = min(num_running, int(loads[-1]))
        seconds = np.array([np.interp(at, loads, column) for column in table.T])
        # Beyond the largest measured load all rows count alike.
        seconds = np.maximum.accumulate(seconds * (num_running / at))
        return LatencyCurve(self.rows, tuple(seconds))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": dict(self.key),
            "num_running": list(self.num_running),
            "rows": list(self.rows),
            "seconds": [list(row) for row in self.seconds],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file completely or not at all; raises OSError."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> LatencyProfile:
        """Read what `to_dict` wrote; raises FormatError or MeasurementError."""
        content = check_content(
            data,
            kind="a latency profile",
            format=FORMAT,
            version=FORMAT_VERSION,
            keys=_KEYS,
        )
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise MeasurementError(str(error)) from error

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], key: Mapping[str, Any] | None = None
    ) -> LatencyProfile:
        """Read strictly; raises FormatError or MeasurementError that names the file.

        key: what the profile must have been measured on; None for anything.
        """
        content = read_json(
            path,
            kind="the latency profile",
            format=FORMAT,
            version=FORMAT_VERSION,
            keys=_KEYS,
            remedy=_REMEDY,
        )
        try:
            profile = cls(**content)
        except (TypeError, ValueError) as error:
            raise MeasurementError(f"{path}: {error}; {_REMEDY}") from error
        for name in sorted({*(key or ()), *profile.key}) if key is not None else ():
            ours, theirs = key.get(name), profile.key.get(name)  # type: ignore[union-attr]
            if ours != theirs:
                raise MeasurementError(
                    f"the profile {path} was measured with {name} {theirs!r}, and this "
                    f"is {ours!r}; {_REMEDY}"
                )
        return profile


def expected_speedup(entry: MenuEntry, curve: LatencyCurve) -> float:
    """Tokens per second of a menu entry relative to plain decoding.

    The mean acceptance length, times the seconds of a plain step, over the mean seconds
    of the entry's steps. A step costs at least what one of 2 rows costs: drafting is
    never free.

    Raises:
        MeasurementError: an entry without an expected acceptance length.
    """
    if entry.acceptance_length is None or not entry.row_shares:
        raise MeasurementError(
            "the tree menu does not say what its entries are expected to accept: "
            "write it again with vllm-ppd calibrate"
        )
    seconds = sum(share * curve(max(rows, 2)) for rows, share in entry.row_shares)
    return entry.acceptance_length * curve(1) / seconds


def cache_file(key: Mapping[str, Any]) -> Path:
    """Where the profile of `key` is kept: under $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    text = json.dumps(key, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(root) / "vllm_ppd" / "profiles" / f"{digest}.json"


def _rising(values: np.ndarray) -> np.ndarray:
    """The nearest rising sequence in least squares (pool adjacent violators)."""
    means: list[float] = []
    sizes: list[int] = []
    for value in values:
        means.append(float(value))
        sizes.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            size = sizes[-2] + sizes[-1]
            mean = (means[-2] * sizes[-2] + means[-1] * sizes[-1]) / size
            means[-2:], sizes[-2:] = [mean], [size]
    return np.repeat(means, sizes)
