"""The bigram table: which tokens tend to follow which.

Prompt rows do not see the candidates they stand behind, so siblings under different
parents would get the same children. The table repairs that without training. For each
token u it lists the n likeliest next tokens c, with gain(c | u), the logarithm of how
much likelier c is after u than anywhere:

    gain(c | u) = log((count(u, c) / base(c) + s) / (count(u) + s))

with base(c) the share of c in the text and s the smoothing, in tokens: a table that
has seen u rarely says little. A token that is not listed under u has the gain of a
count of zero, ``floor[u]``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_ppd.files import write_bytes

__all__ = ["BIGRAM_FILE", "BigramCounts", "BigramError", "BigramTable"]

BIGRAM_FILE = "bigram.safetensors"
FORMAT_VERSION = 1
SMOOTHING = 20.0


class BigramError(ValueError):
    """A bigram table that cannot be read or used."""


@dataclass(frozen=True, eq=False)
class BigramTable:
    """V tokens, n bigram each; 8 bytes per entry in memory, 6 on disk.

    Raises BigramError for shapes that disagree, ids outside the vocabulary and
    values that are not finite.
    """

    ids: np.ndarray
    """int32 [V, n], likeliest first."""
    gains: np.ndarray
    """float32 [V, n], in nats."""
    floor: np.ndarray
    """float32 [V], gain of every token that is not listed."""
    weights: tuple[float, ...]
    """[m] how much of the gain to add to the logits of prompt token d."""
    base: np.ndarray
    """float32 [V], share of each token in the text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.ascontiguousarray(self.ids, np.int32))
        for name in ("gains", "floor", "base"):
            value = np.ascontiguousarray(getattr(self, name), np.float32)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        vocabulary = len(self.floor)
        if self.ids.ndim != 2 or not self.ids.shape == self.gains.shape:
            raise BigramError(
                f"ids {list(self.ids.shape)} and gains {list(self.gains.shape)} of a "
                "bigram table must both be [vocabulary, n]"
            )
        sizes = len(self.ids), len(self.base)
        if sizes != (vocabulary, vocabulary) or not self.weights:
            raise BigramError(
                f"the bigram table has {sizes[0]} rows of ids, {sizes[1]} base "
                f"rates, {vocabulary} floors and {len(self.weights)} weights; it is "
                "damaged"
            )
        if self.ids.min(initial=0) < 0 or self.ids.max(initial=0) >= vocabulary:
            raise BigramError(
                f"the bigram table names token {int(self.ids.max(initial=0))} "
                f"outside its vocabulary of {vocabulary}"
            )
        values = (self.gains, self.floor, np.array(self.weights))
        if not all(np.isfinite(value).all() for value in values):
            raise BigramError("the bigram table holds NaN or infinite values")
        if not (np.isfinite(self.base).all() and self.base.min(initial=1) > 0):
            raise BigramError("base rates of a bigram table must be above 0")

    @classmethod
    def empty(
        cls, vocab_size: int, size: int, weights: tuple[float, ...]
    ) -> BigramTable:
        """A table that has seen nothing and changes no ranks."""
        size = min(size, vocab_size)
        ids = np.tile(np.arange(size, dtype=np.int32), (vocab_size, 1))
        base = np.full(vocab_size, 1 / vocab_size)
        return cls(ids, np.zeros(ids.shape), np.zeros(vocab_size), weights, base)

    @property
    def vocab_size(self) -> int:
        return len(self.floor)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(a.nbytes for a in (self.ids, self.gains, self.floor, self.base))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, completely or not at all."""
        tensors = {
            "ids": self.ids,
            "gains": self.gains.astype(np.float16),
            "floor": self.floor.astype(np.float16),
            "base": self.base,
        }
        notes = {
            "format": "ppd_bigram",
            "format_version": str(FORMAT_VERSION),
            "weights": json.dumps(self.weights),
        }
        write_bytes(path, save(tensors, notes))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], vocab_size: int, num_prompt_tokens: int
    ) -> BigramTable:
        """Read strictly; raises BigramError that names the file."""
        remedy = "write it again with vllm-ppd calibrate, or remove it"
        try:
            with safe_open(Path(path), "numpy") as file:
                notes = file.metadata() or {}
                if notes.get("format") != "ppd_bigram" or notes.get(
                    "format_version"
                ) != str(FORMAT_VERSION):
                    raise BigramError(f"it is no bigram table of ours; {remedy}")
                table = cls(
                    file.get_tensor("ids"),
                    file.get_tensor("gains"),
                    file.get_tensor("floor"),
                    tuple(json.loads(notes["weights"])),
                    file.get_tensor("base"),
                )
        except (OSError, SafetensorError, BigramError, ValueError, KeyError) as why:
            raise BigramError(f"{path}: {why}") from why
        if (table.vocab_size, len(table.weights)) != (vocab_size, num_prompt_tokens):
            raise BigramError(
                f"{path} is for {table.vocab_size} tokens and {len(table.weights)} "
                f"prompt tokens, but the model has {vocab_size} and the folder "
                f"{num_prompt_tokens}; {remedy}"
            )
        return table


class BigramCounts:
    """Collects (token, next token, weight) and makes a table of them.

    Weights are 1 for pairs of a text; for the model's own distributions, its
    probabilities of the likeliest next tokens.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._keys: np.ndarray = np.empty(0, np.int64)
        self._sums: np.ndarray = np.empty(0)
        self._totals: np.ndarray = np.zeros(vocab_size)

    def add(self, parents: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
        """Add pairs; all [N], parents and ids integers below ``vocab_size``."""
        keys = parents.astype(np.int64) * self.vocab_size + ids
        keys = np.concatenate([self._keys, keys])
        sums = np.concatenate([self._sums, weights])
        self._keys, place = np.unique(keys, return_inverse=True)
        self._sums = np.bincount(place, sums, len(self._keys))
        self._totals += np.bincount(parents, weights, self.vocab_size)

    def table(
        self, size: int, num_prompt_tokens: int, smoothing: float = SMOOTHING
    ) -> BigramTable:
        """The table of the ``size`` likeliest bigram, with weights of 1."""
        parents, ids = np.divmod(self._keys, self.vocab_size)
        base: np.ndarray = np.bincount(ids, self._sums, self.vocab_size)
        # A token never seen is not infinitely surprising: one sighting each.
        base = (base + 1) / (base.sum() + self.vocab_size)
        order = np.lexsort((-self._sums, parents))
        counts: np.ndarray = np.bincount(parents, minlength=self.vocab_size)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = order[place < size]
        rows, columns = parents[kept], place[place < size]
        # Tokens with few bigram list the commonest tokens, at their floor.
        common = np.argsort(-base, kind="stable")[: 2 * size].astype(np.int32)
        table = np.tile(common[:size], (self.vocab_size, 1))
        floor = np.log(smoothing / (self._totals + smoothing))
        gains = np.repeat(floor[:, None], size, axis=1)
        listed = self._sums[kept] / base[ids[kept]] + smoothing
        starts = np.cumsum(counts) - counts
        for row in np.flatnonzero((counts > 0) & (counts < size)).tolist():
            own = ids[starts[row] : starts[row] + counts[row]]
            table[row, len(own) :] = common[~np.isin(common, own)][: size - len(own)]
        table[rows, columns] = ids[kept]
        gains[rows, columns] = np.log(listed / (self._totals[rows] + smoothing))
        weights = (1.0,) * num_prompt_tokens
        return BigramTable(table, gains, floor, weights, base)
