"""Step latency: seconds of a step by its rows, and by how many requests share it.

A `LatencyCurve` is the paper's hardware curve, for one load. A `LatencyProfile` holds
the curves of all loads, as measured through the real engine; it is kept in the user's
cache folder under a key of everything that changes it: model, data type, quantisation,
device, parallelism, versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ppd.files import read_json, write_json
from vllm_ppd.trees.menu import MenuEntry

FORMAT = "ppd_latency_profile"
FORMAT_VERSION = 1
_KEYS = ("key", "num_running", "rows", "seconds")
_REMEDY = "measure again with vllm-ppd profile"


class MeasurementError(ValueError):
    """Latencies or acceptance probabilities that cannot be."""


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds per step, straight between the measured points, never falling."""

    rows: tuple[int, ...]
    """Rows of each measured point, all of one request, rising from 1."""
    seconds: tuple[float, ...]
    """Seconds of a step with that many rows."""
    tail: float
    """Seconds per row beyond the last point."""

    @classmethod
    def constant(cls) -> LatencyCurve:
        """A step of any size takes a second: only tokens per step count."""
        return cls.linear(1.0, 0.0)

    @classmethod
    def linear(cls, first: float, per_row: float) -> LatencyCurve:
        """`first` seconds for one row, `per_row` for each further one."""
        return cls((1,), (first,), tail=per_row)

    def __call__(self, rows: Any) -> Any:
        """Seconds of a step with `rows` (one number, or an array of any shape).

        A mean number of rows has parts of a row, too.
        """
        beyond = np.maximum(np.subtract(rows, self.rows[-1]), 0)
        return np.interp(rows, self.rows, self.seconds) + self.tail * beyond


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
        if not isinstance(self.key, Mapping):
            raise MeasurementError(
                f"key of a profile is {self.key!r}; expected an object"
            )
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
        # Rows beyond the last cost its mean: unmeasured ones must not look free.
        tail = float(seconds[-1]) / self.rows[-1]
        return LatencyCurve(self.rows, tuple(seconds.tolist()), tail)

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
        """What `to_dict` was called on."""
        return cls(**{name: data[name] for name in _KEYS})

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
        except (TypeError, ValueError, OverflowError) as error:
            raise MeasurementError(f"{path}: {error}; {_REMEDY}") from error
        key = profile.key if key is None else key
        for name in sorted({*key, *profile.key}):
            ours, theirs = key.get(name), profile.key.get(name)
            if ours != theirs:
                raise MeasurementError(
                    f"the profile {path} was measured with {name} {theirs!r}, and this "
                    f"is {ours!r}; {_REMEDY}"
                )
        return profile


def expected_speedup(entry: MenuEntry, curve: LatencyCurve) -> float | None:
    """Tokens per second of a menu entry relative to plain decoding; None if not known.

    The mean acceptance length over the mean `step_ratio`.
    """
    if entry.acceptance_length is None or not entry.row_shares:
        return None
    return entry.acceptance_length / step_ratio(entry, curve)


def step_ratio(entry: MenuEntry, curve: LatencyCurve) -> float:
    """Mean seconds of a menu entry's steps over those of a plain step.

    A step costs at least what one of 2 rows costs: drafting is never free. An entry of
    which the mean rows are not known always has its most.
    """
    shares = entry.row_shares or ((entry.max_rows, 1.0),)
    seconds = sum(share * curve(max(rows, 2)) for rows, share in shares)
    return seconds / curve(1)


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
