"""How likely each candidate is, by where it stands: what a tree search needs to know.

A candidate's chance depends on what guessed it. Below the root's own chain of prompt
rows it comes from a prompt row and, if there is one, the successor table; deeper, from
the table alone. On the chain that continues an earlier match, rank 0 is the chain's
next token and the ranks after it are the ordinary candidates without that token.
All chances are given that the parent was right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ppd.files import write_json
from vllm_ppd.search.acceptance_table import AcceptanceStats

__all__ = ["EVIDENCE_FILE", "Evidence", "EvidenceError"]

EVIDENCE_FILE = "evidence.json"
FORMAT = "ppd_evidence"
FORMAT_VERSION = 2
_TABLES = ("prompted", "unprompted", "chain", "beside", "moves", "overall")
_REMEDY = "measure it again with vllm-ppd calibrate, or remove it"

# Levels below the last prompt row's that the successor table alone may fill.
BEYOND = 2


class EvidenceError(ValueError):
    """Chances that cannot be: wrong shapes, or no probabilities."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Chances of candidates. m prompt tokens, K ranks, C match classes, D chain depths.

    Raises EvidenceError for shapes that disagree, and for values that are no
    probabilities.
    """

    prompted: np.ndarray
    """[m, K] of rank r at depth d + 1, guessed by prompt token d + 1, where there is no
    match (where there is one, the text is easier)."""
    unprompted: np.ndarray
    """[K] of rank r below any node that no prompt row looks beyond, without a match;
    zeros without a successor table."""
    chain: np.ndarray
    """[C, D] of the chain's token at depth d + 1, in match class c + 1."""
    beside: np.ndarray
    """[C, m, K] of rank r beside the chain's token, given that it is wrong."""
    moves: np.ndarray
    """[2, C + 1, C + 1] chance of the next step's match class (last axis), after a step
    that accepted no guess and after one that did; class 0 is no match. A step that
    accepts goes further, and on a chain stays on it."""
    overall: np.ndarray
    """[m + 1, K] prompted, then unprompted, with and without a match."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the figures come from, for people; nothing reads it."""

    def __post_init__(self) -> None:
        for name in _TABLES:
            value = np.array(getattr(self, name), dtype=np.float64)
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        m, k = self.prompted.shape if self.prompted.ndim == 2 else (0, 0)
        classes = len(self.chain)
        for name, shape in (
            ("unprompted", (k,)),
            ("beside", (classes, m, k)),
            ("moves", (2, classes + 1, classes + 1)),
            ("overall", (m + 1, k)),
        ):
            if getattr(self, name).shape != shape or not m:
                raise EvidenceError(
                    f"{name} has shape {list(getattr(self, name).shape)}; expected "
                    f"{list(shape)} beside prompted {list(self.prompted.shape)}"
                )
        for name in _TABLES:
            value = getattr(self, name)
            if not ((value >= 0) & (value <= 1 + 1e-6)).all():
                raise EvidenceError(f"{name} holds values outside [0, 1]")
        if np.abs(self.moves.sum(axis=2) - 1).max() > 1e-6:
            raise EvidenceError("each row of moves must sum to 1")

    @classmethod
    def of(cls, stats: AcceptanceStats) -> Evidence:
        """Prompt rows alone: no successor table, no matches."""
        m, k = stats.acceptance.shape
        return cls(
            stats.acceptance,
            np.zeros(k),
            np.zeros((0, 0)),
            np.zeros((0, m, k)),
            np.ones((2, 1, 1)),
            np.concatenate([stats.acceptance, np.zeros((1, k))]),
        )

    def with_typical_chains(self) -> Evidence:
        """The same with matches as they are in ordinary text, where none were measured.

        A chain is right about half of the time after a match of 2 or 3 tokens, three
        quarters after a longer one, and surer the further it has held. Moves are about
        those of the demo model (its evidence.json).
        """
        if len(self.chain):
            return self
        chain = [[0.45, 0.55, 0.6, 0.65, 0.65, 0.65], [0.7, 0.75, 0.8, 0.8, 0.8, 0.8]]
        return replace(
            self,
            chain=np.array(chain),
            beside=np.stack([0.7 * self.prompted] * 2),
            moves=np.array(
                [
                    [[0.75, 0.2, 0.05], [0.65, 0.25, 0.1], [0.5, 0.15, 0.35]],
                    [[0.6, 0.3, 0.1], [0.45, 0.15, 0.4], [0.25, 0.1, 0.65]],
                ]
            ),
        )

    def without_chains(self) -> Evidence:
        """The same where matches are not looked for."""
        m, k = self.prompted.shape
        return replace(
            self,
            prompted=self.overall[:-1],
            unprompted=self.overall[-1],
            chain=np.zeros((0, 0)),
            beside=np.zeros((0, m, k)),
            moves=np.ones((2, 1, 1)),
        )

    def to_dict(self) -> dict[str, Any]:
        tables = {name: getattr(self, name).tolist() for name in _TABLES}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **tables,
            "source": dict(self.source),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file completely or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Read a file strictly; raises EvidenceError that names it."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise EvidenceError(
                f"the evidence {path} cannot be read: {error}"
            ) from error
        except ValueError as error:
            raise EvidenceError(f"{path} is not JSON ({error}); {_REMEDY}") from error
        try:
            return cls.from_dict(data)
        except EvidenceError as error:
            raise EvidenceError(f"{path}: {error}; {_REMEDY}") from error

    @classmethod
    def from_dict(cls, data: Any) -> Evidence:
        """Read what `to_dict` wrote; raises EvidenceError for anything else."""
        expected = {"format", "format_version", *_TABLES, "source"}
        if not isinstance(data, dict) or set(data) != expected:
            raise EvidenceError("it is no file of evidence")
        if (data["format"], data["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise EvidenceError(
                f"format is {data['format']!r} {data['format_version']!r}; expected "
                f"{FORMAT!r} {FORMAT_VERSION}"
            )
        tables = {name: data[name] for name in (*_TABLES, "source")}
        try:
            m, k = np.shape(tables["prompted"])
            tables["beside"] = np.reshape(tables["beside"], (-1, m, k))
            if not tables["chain"]:
                tables["chain"] = np.zeros((0, 0))
            return cls(**tables)
        except (TypeError, ValueError) as error:
            raise EvidenceError(str(error)) from error

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompted)

    @property
    def num_classes(self) -> int:
        """Match classes, the one without a match included."""
        return len(self.chain) + 1

    def max_depth(self, match_class: int) -> int:
        """Depth below which no candidate has a chance worth a row."""
        deepest = self.num_prompt_tokens
        if self.unprompted.any():
            deepest += BEYOND
        return max(deepest, self.chain.shape[1] if match_class else 0)

    def chances(
        self, state: int, match_class: int, depth: int, on_chain: bool
    ) -> np.ndarray:
        """[K] or [K + 1] chance of each rank at `depth` (from 1).

        on_chain: the parent is on the chain, so rank 0 continues it.
        """
        prompted = depth <= min(state, self.num_prompt_tokens)
        ranks = self.prompted[depth - 1] if prompted else self.unprompted
        if depth > self.num_prompt_tokens + BEYOND:
            ranks = np.zeros_like(ranks)
        if not on_chain or match_class == 0:
            return ranks
        chain = self.chain[match_class - 1]
        right = chain[depth - 1] if depth <= len(chain) else 0.0
        if prompted:
            ranks = self.beside[match_class - 1, depth - 1]
        return np.concatenate([[right], (1 - right) * ranks])
