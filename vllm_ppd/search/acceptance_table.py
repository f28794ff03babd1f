"""How often each guess is right: the statistics that a tree search starts from.

The paper builds its dynamic sparse trees from this table: the accuracy of each prompt
token at each rank, measured on sample text. On disk it is JSON: `{"format":
"ppd_acceptance", "format_version": 1, "acceptance": [[...], ...], "source": {...}}`,
the source (notes on model, data and date of the measurement) being optional.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ppd.files import write_json

__all__ = ["AcceptanceError", "AcceptanceStats"]

FORMAT = "ppd_acceptance"
FORMAT_VERSION = 1

_KEYS = ("format", "format_version", "acceptance", "source")
_REMEDY = "measure the table again with vllm-ppd calibrate"
# Counts divided by their total in float32 may add up to a little over one.
_SUM_TOLERANCE = 1e-6


class AcceptanceError(ValueError):
    """Acceptance statistics that cannot be read, written or used."""


@dataclass(frozen=True, eq=False)
class AcceptanceStats:
    """The chance that each guess is the true token.

    Raises AcceptanceError unless `acceptance` is a table [m, K], m and K at least 1,
    of values in [0, 1] with rows that sum to at most 1, and `source` is a JSON object.
    """

    acceptance: np.ndarray
    """float64 [m, K], read-only: `acceptance[d][r]` is the probability that the token
    at distance d + 1 is the rank-r candidate of prompt token d + 1, over all points;
    tree search takes it for the probability given that the tokens before it were
    guessed rightly (the paper's independence). Ranks need not fall in probability."""
    source: Mapping[str, Any] | None = None
    """Where the figures come from, for people; nothing reads it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "acceptance", _checked_table(self.acceptance))
        if self.source is None:
            return
        if not isinstance(self.source, Mapping):
            raise AcceptanceError(
                f"source is {self.source!r}; expected an object with a note on the "
                "measurement, or nothing"
            )
        try:
            copied = json.loads(json.dumps(dict(self.source), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AcceptanceError(
                f"source cannot be written as JSON ({error}); use text, finite "
                "numbers, lists and objects only"
            ) from error
        object.__setattr__(self, "source", copied)

    @property
    def num_prompt_tokens(self) -> int:
        """m: how many tokens beyond the next one are guessed."""
        return self.acceptance.shape[0]

    @property
    def num_ranks(self) -> int:
        """K: how many candidates per distance were measured."""
        return self.acceptance.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "acceptance": self.acceptance.tolist(),
        }
        if self.source is not None:
            content["source"] = self.source
        return content

    @classmethod
    def from_dict(cls, content: Any) -> AcceptanceStats:
        """Read what `to_dict` wrote; raises AcceptanceError for anything else."""
        kind = content.get("format") if isinstance(content, dict) else None
        if kind != FORMAT:
            what = f"format {kind!r}" if kind is not None else "no format"
            raise AcceptanceError(
                f"this is no acceptance table: expected an object with format "
                f"{FORMAT!r}, found {what}; {_REMEDY}"
            )
        for key in content:
            if key not in _KEYS:
                close = difflib.get_close_matches(key, _KEYS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {_KEYS}"
                raise AcceptanceError(f"there is an unknown key {key!r}; {hint}")
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise AcceptanceError(
                f"format_version is {version!r}; this release reads version "
                f"{FORMAT_VERSION}: upgrade vllm-ppd or {_REMEDY}"
            )
        if "acceptance" not in content:
            raise AcceptanceError(f"the key 'acceptance' is missing; {_REMEDY}")
        return cls(content["acceptance"], content.get("source"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file completely or not at all, replacing an earlier one.

        Raises AcceptanceError when it cannot be written.
        """
        try:
            write_json(path, self.to_dict())
        except OSError as error:
            raise AcceptanceError(
                f"the acceptance table cannot be written to {path}: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AcceptanceStats:
        """Read a file strictly; raises AcceptanceError that names the path."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise AcceptanceError(
                f"the acceptance table {path} cannot be read ({error}); {_REMEDY}"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise AcceptanceError(f"{path} is not JSON ({error}); {_REMEDY}") from error
        try:
            return cls.from_dict(content)
        except AcceptanceError as error:
            raise AcceptanceError(f"{path}: {error}") from error


def _checked_table(values: Any) -> np.ndarray:
    try:
        raw = np.asarray(values)
        # Text, booleans and objects convert to floats too; none of them is meant.
        if raw.dtype.kind not in "fiu":
            raise ValueError(f"its values are of type {raw.dtype}")
        table = np.array(raw, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise AcceptanceError(
            "acceptance is not a table of numbers, one row of equal length per prompt "
            f"token ({str(error).split(chr(10))[0]}); {_REMEDY}"
        ) from error
    if table.ndim != 2 or 0 in table.shape:
        raise AcceptanceError(
            f"acceptance has shape {list(table.shape)}; expected [prompt tokens, "
            f"ranks], each at least 1: {_REMEDY}"
        )
    bad = np.argwhere(~((table >= 0) & (table <= 1)))
    if len(bad):
        row, rank = bad[0].tolist()
        raise AcceptanceError(
            f"acceptance[{row}][{rank}] is {table[row, rank]:g}; expected a "
            f"probability in [0, 1]: {_REMEDY}"
        )
    sums = table.sum(axis=1)
    over = np.flatnonzero(sums > 1 + _SUM_TOLERANCE)
    if len(over):
        raise AcceptanceError(
            f"acceptance[{over[0]}] sums to {sums[over[0]]:.6g}; only one candidate "
            f"can be right, so expected at most 1 (per rank, not cumulative): {_REMEDY}"
        )
    table.setflags(write=False)
    return table
