"""How long a step takes on this machine: by running requests, rows and context of each.

A profile is a table measured through the real engine (`engine/measure_grid.py`) and
kept in the user's cache folder under a key of everything that changes it: model, data
type, quantisation, device, parallelism, versions. Files are JSON; one that is damaged
or of another key is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ppd.adaptive.context_cost import ContextCost
from vllm_ppd.files import write_json
from vllm_ppd.search.latency import LatencyCurve

__all__ = ["LatencyProfile", "MeasurementError", "cache_file", "default_profile"]

FORMAT = "ppd_profile"
FORMAT_VERSION = 3

# Seconds of a step, relative to one of a single row, by all rows of all requests: soon
# compute-bound cores, and a device that waits for its memory. Used until measured.
_TYPICAL = {
    "cpu": ((1, 8, 16, 32, 64), (1.0, 1.25, 1.75, 2.8, 5.0)),
    "cuda": ((1, 64, 128, 256, 512), (1.0, 1.05, 1.15, 1.5, 2.4)),
}
# What a step with guesses costs beyond its rows, on the same scale.
_TYPICAL_OVERHEAD = {"cpu": 0.25, "cuda": 0.05}


class MeasurementError(ValueError):
    """A profile that cannot be read or is not of this machine and model."""


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds per step; raises MeasurementError for tables that no machine has.

    Attributes:
        requests: [R] running requests, rising from 1.
        rows: [Q] rows per request, rising from 1, which is a plain step.
        seconds: [R][Q], with short contexts.
        key: what it was measured on.
        context_cost: what longer ones add; None if not known.
        bare: [R] of a step in which nobody guesses, though guesses may come: it has to
            look for them. Empty where that is no longer than a plain step.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    key: Mapping[str, Any]
    context_cost: ContextCost | None = None
    bare: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", tuple(int(n) for n in self.requests))
        object.__setattr__(self, "rows", tuple(int(n) for n in self.rows))
        table = tuple(tuple(float(t) for t in row) for row in self.seconds)
        object.__setattr__(self, "seconds", table)
        object.__setattr__(self, "bare", tuple(float(t) for t in self.bare))
        for name in ("requests", "rows"):
            values = getattr(self, name)
            if not values or values[0] != 1 or list(values) != sorted(set(values)):
                raise MeasurementError(
                    f"{name} of a profile are {list(values)}; expected rising from 1"
                )
        shape = len(self.requests), len(self.rows)
        array = np.array(table, dtype=np.float64) if table else np.empty(0)
        if array.shape != shape:
            raise MeasurementError(
                f"seconds has shape {list(array.shape)}; expected {list(shape)}"
            )
        if not (np.isfinite(array) & (array > 0)).all():
            raise MeasurementError("seconds must be finite and positive")
        if self.bare and len(self.bare) != len(self.requests):
            raise MeasurementError(
                f"bare has {len(self.bare)} times; expected {shape[0]} or none"
            )
        plain = array[:, 0]
        if self.bare and not (plain <= self.bare).all():
            raise MeasurementError(
                f"bare steps take {list(self.bare)} s; expected at least as long as "
                f"plain ones, {plain.tolist()} s"
            )

    @classmethod
    def smoothed(
        cls,
        requests: Sequence[int],
        rows: Sequence[int],
        seconds: np.ndarray,
        key: Mapping[str, Any],
        bare: np.ndarray | None = None,
    ) -> LatencyProfile:
        """From raw measurements [R, Q]: more rows or requests never look faster.

        A pool-adjacent-violators pass along the rows, then along the requests, which
        averages neighbours that are out of order.
        """
        table = seconds if bare is None else np.insert(seconds, 1, bare, axis=1)
        table = np.array([_rising(row) for row in table])
        table = np.array([_rising(column) for column in table.T]).T
        known: tuple[float, ...] = ()
        if bare is not None:
            known, table = tuple(table[:, 1]), np.delete(table, 1, axis=1)
        return cls(
            tuple(requests), tuple(rows), tuple(map(tuple, table)), key, bare=known
        )

    def at_context(self, tokens: int) -> LatencyProfile:
        """Steps of requests that have so much context in the mean."""
        cost = self.context_cost
        if cost is None or tokens <= cost.context:
            return self
        added = cost.added(self.requests, self.rows, tokens)
        table = np.array(self.seconds) + added
        bare = np.array(self.bare) + added[:, 0] if self.bare else None
        found = self.smoothed(self.requests, self.rows, table, self.key, bare)
        return replace(found, context_cost=replace(cost, context=tokens))

    def curve(self, requests: int) -> LatencyCurve:
        """Seconds by rows per request at so many running requests, while guesses may
        come, and those of a plain step."""
        table = np.array(self.seconds)
        plain = table[:, 0].copy()
        if self.bare:
            table[:, 0] = self.bare
        known = np.array(self.requests)
        at = min(requests, int(known[-1]))
        columns = np.vstack([plain, table.T])
        seconds = np.array([np.interp(at, known, column) for column in columns])
        # Beyond what was measured all rows count alike.
        seconds = np.maximum.accumulate(seconds * (requests / at))
        return LatencyCurve(self.rows, tuple(seconds[1:]), plain=seconds[0])

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": dict(self.key),
            "requests": list(self.requests),
            "rows": list(self.rows),
            "seconds": [list(row) for row in self.seconds],
            "context_cost": self.context_cost and self.context_cost.to_dict(),
            "bare": list(self.bare),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> LatencyProfile:
        """Read what `to_dict` wrote; raises MeasurementError for anything else."""
        if not isinstance(data, dict) or not {"format", "format_version"} <= set(data):
            raise MeasurementError("it is no latency profile")
        if (data["format"], data["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise MeasurementError(
                f"format is {data['format']!r} {data['format_version']!r}; expected "
                f"{FORMAT!r} {FORMAT_VERSION}"
            )
        names = ("requests", "rows", "seconds", "key", "context_cost", "bare")
        if set(data) != {"format", "format_version", *names}:
            raise MeasurementError("it is no latency profile")
        values = {name: data[name] for name in names}
        try:
            if (cost := values["context_cost"]) is not None:
                values["context_cost"] = ContextCost(**cost)
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise MeasurementError(str(error)) from error

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], key: Mapping[str, Any] | None = None
    ) -> LatencyProfile:
        """Read strictly; with `key`, raise MeasurementError for a profile of another."""
        remedy = "measure again with vllm-ppd profile"
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise MeasurementError(
                f"the profile {path} cannot be read: {error}"
            ) from error
        except ValueError as error:
            raise MeasurementError(f"{path} is not JSON ({error}); {remedy}") from error
        try:
            profile = cls.from_dict(data)
        except MeasurementError as error:
            raise MeasurementError(f"{path}: {error}; {remedy}") from error
        if key is not None:
            for name in sorted({*key, *profile.key}):
                here, there = key.get(name), profile.key.get(name)
                if here != there:
                    raise MeasurementError(
                        f"the profile {path} was measured with {name} {there!r}, and "
                        f"this is {here!r}; {remedy}"
                    )
        return profile


def default_profile(device: str) -> LatencyProfile:
    """A typical profile of a kind of device, in units of a plain step of one row."""
    known, relative = _TYPICAL[device]
    curve = LatencyCurve(known, relative)
    requests, rows = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64, 129)
    table = [
        [
            float(curve(np.array([n * r]))[0])
            + (_TYPICAL_OVERHEAD[device] if r > 1 else 0.0)
            for r in rows
        ]
        for n in requests
    ]
    return LatencyProfile(requests, rows, tuple(map(tuple, table)), {"typical": device})


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
