"""The bigram table: for each token its likeliest next tokens, and how likely they are.

A prompt row does not attend to the draft tokens before its position, so without the
table all nodes of one depth would get the same children. The table lists for each token
u the n likeliest next tokens c, with gain(c | u), the logarithm of how much likelier c
is after u than after any token:

    gain(c | u) = log((count(u, c) / base(c) + s) / (count(u) + s))

base(c) is the share of c among all tokens and s the smoothing, in tokens, which keeps
gains near 0 for tokens that were rarely observed. A token that is not listed under u
has the gain of a count of zero, ``floor[u]``.

The table continues to learn while it serves. Verification computes the target's logits
at every node, so each accepted token u comes with the target's own distribution of the
next token: an observation of weight one for row u. A table that starts empty is useful
after some thousand observations.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_ppd.files import FormatError, write_bytes

BIGRAM_FILE = "bigram.safetensors"
FORMAT = "ppd_bigram"
FORMAT_VERSION = 1
SMOOTHING = 20.0
# Likeliest next tokens that one observation adds to its row.
OBSERVED = 8
# Observations that a row remembers; older ones fade, so that it follows the traffic.
ROW_MEMORY = 2048.0
_REMEDY = "write it again with vllm-ppd calibrate, or remove it"


@dataclass(frozen=True, eq=False)
class BigramTable:
    """V tokens, n next tokens each; 8 bytes per entry in memory, 6 on disk.

    Raises:
        FormatError: shapes that disagree, ids outside the vocabulary, or values that
            are not finite.
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
            raise FormatError(
                f"ids {list(self.ids.shape)} and gains {list(self.gains.shape)} of a "
                "bigram table must both be [vocabulary, n]"
            )
        sizes = len(self.ids), len(self.base)
        if sizes != (vocabulary, vocabulary):
            raise FormatError(
                f"the bigram table has {sizes[0]} rows of ids, {sizes[1]} base rates "
                f"and {vocabulary} floors; it is damaged"
            )
        if self.ids.min(initial=0) < 0 or self.ids.max(initial=0) >= vocabulary:
            raise FormatError(
                f"the bigram table names token {int(self.ids.max(initial=0))} "
                f"outside its vocabulary of {vocabulary}"
            )
        values = (self.gains, self.floor, np.array(self.weights))
        if not all(np.isfinite(value).all() for value in values):
            raise FormatError("the bigram table holds NaN or infinite values")
        if not (np.isfinite(self.base).all() and self.base.min(initial=1) > 0):
            raise FormatError("base rates of a bigram table must be above 0")

    @classmethod
    def empty(
        cls, vocab_size: int, size: int, weights: tuple[float, ...]
    ) -> BigramTable:
        """A table without observations; it changes no ranks."""
        size = min(size, vocab_size)
        ids = np.tile(np.arange(size, dtype=np.int32), (vocab_size, 1))
        base = np.full(vocab_size, 1 / vocab_size)
        return cls(ids, np.zeros(ids.shape), np.zeros(vocab_size), weights, base)

    @property
    def vocab_size(self) -> int:
        return len(self.floor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, completely or not at all; raises OSError."""
        tensors = {
            "ids": self.ids,
            "gains": self.gains.astype(np.float16),
            "floor": self.floor.astype(np.float16),
            "base": self.base,
        }
        notes = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "weights": json.dumps(self.weights),
        }
        write_bytes(path, save(tensors, notes))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], vocab_size: int, num_prompt_tokens: int
    ) -> BigramTable:
        """Read strictly.

        Raises:
            FormatError: the message names the file.
        """
        try:
            with safe_open(Path(path), "numpy") as file:
                notes = file.metadata() or {}
                own = notes.get("format"), notes.get("format_version")
                if own != (FORMAT, str(FORMAT_VERSION)):
                    raise FormatError(
                        f"its format is {own[0]!r} version {own[1]}; expected "
                        f"{FORMAT!r} version {FORMAT_VERSION}"
                    )
                table = cls(
                    file.get_tensor("ids"),
                    file.get_tensor("gains"),
                    file.get_tensor("floor"),
                    tuple(json.loads(notes["weights"])),
                    file.get_tensor("base"),
                )
        except KeyError as error:
            raise FormatError(f"{path}: {error} is missing; {_REMEDY}") from error
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise FormatError(
                f"the bigram table {path} cannot be used ({error}); {_REMEDY}"
            ) from error
        if (table.vocab_size, len(table.weights)) != (vocab_size, num_prompt_tokens):
            raise FormatError(
                f"{path} is for {table.vocab_size} tokens and {len(table.weights)} "
                f"prompt tokens, but the model has {vocab_size} and the folder "
                f"{num_prompt_tokens}; {_REMEDY}"
            )
        return table


class BigramCounts:
    """Counts of (token, next token, weight), from which a table is made.

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
        """The table of the ``size`` likeliest next tokens, with weights of 1."""
        parents, ids = np.divmod(self._keys, self.vocab_size)
        base: np.ndarray = np.bincount(ids, self._sums, self.vocab_size)
        # One observation each, so that no token's gain is infinite.
        base = (base + 1) / (base.sum() + self.vocab_size)
        order = np.lexsort((-self._sums, parents))
        counts: np.ndarray = np.bincount(parents, minlength=self.vocab_size)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = order[place < size]
        rows, columns = parents[kept], place[place < size]
        # Rows with fewer next tokens are filled with the commonest, at their floor.
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


class BigramTensors(NamedTuple):
    """A bigram table on a device."""

    ids: torch.Tensor
    """int64 [V, n]; int32 on CPU."""
    gains: torch.Tensor
    """float32 [V, n]."""
    floor: torch.Tensor
    """float32 [V]."""

    @classmethod
    def of(
        cls, table: BigramTable, device: torch.device | str = "cpu"
    ) -> BigramTensors:
        """Copies of the table's arrays."""
        ids = torch.tensor(table.ids, device=device)
        return cls(
            ids if ids.device.type == "cpu" else ids.long(),
            torch.tensor(table.gains, device=device),
            torch.tensor(table.floor, device=device),
        )


@dataclass(frozen=True, eq=False)
class OnlineBigram:
    """A bigram table with its counts, which learns; V tokens, n next tokens each.

    All tensors lie on one device and change in place, so trees that are filled from
    `table` get what was learnt. Memory: 12 n + 12 bytes per token, 16 n where ids are
    int64.
    """

    table: BigramTensors
    """Trees are filled from it."""
    counts: torch.Tensor
    """float32 [V, n], observed weight of each listed next token."""
    totals: torch.Tensor
    """float32 [V], observations of each token."""
    base: torch.Tensor
    """float32 [V], observed weight of each token as the next one of any."""
    base_total: torch.Tensor
    """float64 [1], the sum of `base`."""

    @classmethod
    def of(cls, table: BigramTable, device: torch.device | str = "cpu") -> OnlineBigram:
        """Start from a table; its own arrays stay unchanged."""
        totals = np.minimum(SMOOTHING * (np.exp(-table.floor) - 1), ROW_MEMORY)
        seen = totals[:, None] + SMOOTHING
        lifts = np.exp(table.gains) * seen - SMOOTHING
        counts = np.maximum(lifts, 0) * table.base[table.ids]
        # An empty table's base rates weigh one observation per token.
        weight = max(float(totals.sum()), float(table.vocab_size))
        base = table.base * weight

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, dtype=torch.float32, device=device)

        return cls(
            BigramTensors.of(table, device),
            counts=tensor(counts),
            totals=tensor(totals),
            base=tensor(base),
            base_total=torch.tensor([base.sum()], dtype=torch.float64, device=device),
        )


def learn_bigrams(
    online: OnlineBigram, tokens: torch.Tensor, logits: torch.Tensor
) -> None:
    """Add observations; shapes are fixed and the host reads nothing.

    Of several observations of one token in a call, the first one counts for its row,
    and all of them for the base rates.

    Args:
        online: changed in place.
        tokens: int [R] each observed token.
        logits: float32 [R, V] the target's logits of the next one.
    """
    ids, gains, floor = online.table
    # NaN logits are ignored.
    probabilities = logits.softmax(dim=1).nan_to_num(0.0)
    online.base.add_(probabilities.sum(0))
    online.base_total.add_(len(tokens))
    added, new = probabilities.topk(min(OBSERVED, probabilities.shape[1]), dim=1)

    tokens = tokens.long()
    total = online.totals[tokens] + 1
    fading = torch.where(total > ROW_MEMORY, 0.5, 1.0)
    total = total * fading
    own = ids[tokens].long()
    counts = online.counts[tokens] * fading[:, None]
    same = own[:, :, None] == new[:, None, :]  # [R, n, k]
    counts = counts + (same * added[:, None, :]).sum(2)
    added = torch.where(same.any(1), -1.0, added)
    # Listed ones first among equals, then by rank: both sorts are stable.
    counts, order = torch.cat([counts, added], 1).sort(
        dim=1, descending=True, stable=True
    )
    kept = torch.cat([own, new], 1).gather(1, order)[:, : own.shape[1]]
    counts = counts[:, : own.shape[1]]
    vocabulary = len(online.base)
    base = (online.base[kept] + 1) / (online.base_total.float() + vocabulary)
    seen = total + SMOOTHING
    gain = ((counts / base + SMOOTHING) / seen[:, None]).log()
    low = (SMOOTHING / seen).log()

    # Duplicate rows all write the values of the first, so the order is irrelevant.
    first = (tokens[:, None] == tokens[None, :]).int().argmax(1)
    ids[tokens] = kept[first].to(ids.dtype)
    gains[tokens] = gain[first]
    floor[tokens] = low[first]
    online.counts[tokens] = counts[first]
    online.totals[tokens] = total[first]
