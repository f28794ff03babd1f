"""How likely each draft token is accepted, by where it stands in the tree.

The acceptance probability of a draft token depends on its source. Below the root's own
prompt rows it comes from a prompt row and, if there is one, the bigram table; deeper,
from the bigram table alone. Along an n-gram draft, rank 0 is the n-gram's next token
and the ranks after it are the ordinary draft tokens without that one. All
probabilities are given that the parent was accepted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ppd.files import read_json, write_json
from vllm_ppd.search.latency import MeasurementError

ACCEPTANCE_FILE = "acceptance.json"
FORMAT = "ppd_acceptance_model"
FORMAT_VERSION = 1
_TABLES = (
    *("marginal", "prompted", "unprompted", "ngram", "beside"),
    *("transitions", "overall"),
)
_REMEDY = "measure it again with vllm-ppd calibrate, or remove it"

# Levels below the last prompt row's that the bigram table alone may fill.
BEYOND = 2


@dataclass(frozen=True, eq=False)
class AcceptanceModel:
    """Acceptance probabilities. m prompt tokens, K ranks, C classes of n-gram matches,
    D depths of n-gram drafts.

    Raises MeasurementError for shapes that disagree, and for values that are no
    probabilities.
    """

    prompted: np.ndarray
    """[m, K] of rank r at depth d + 1, from prompt token d + 1, in steps without an
    n-gram match (with a match, the text is easier)."""
    unprompted: np.ndarray
    """[K] of rank r below any node that no prompt row looks beyond, without a match;
    zeros without a bigram table."""
    ngram: np.ndarray
    """[C, D] of the n-gram draft's token at depth d + 1, in match class c + 1."""
    beside: np.ndarray
    """[C, m, K] of rank r beside the n-gram's token, given that that one is wrong."""
    transitions: np.ndarray
    """[2, C + 1, C + 1] probability of the next step's match class (last axis), after a
    step that accepted no draft token and after one that did; class 0 is no match. A
    step that accepts goes further, and inside a match stays in it."""
    overall: np.ndarray
    """[m + 1, K] prompted, then unprompted, with and without a match."""
    marginal: np.ndarray
    """[m, K] that the token at distance d + 1 is rank r of prompt token d + 1's own
    output, over all positions: the paper's acceptance table."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the figures come from, for people; the code does not use it."""

    def __post_init__(self) -> None:
        for name in _TABLES:
            value = _checked_numbers(name, getattr(self, name))
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        m, k = self.prompted.shape if self.prompted.ndim == 2 else (0, 0)
        classes = len(self.ngram)
        for name, shape in (
            ("unprompted", (k,)),
            ("beside", (classes, m, k)),
            ("transitions", (2, classes + 1, classes + 1)),
            ("overall", (m + 1, k)),
        ):
            if getattr(self, name).shape != shape or not k:
                raise MeasurementError(
                    f"{name} has shape {list(getattr(self, name).shape)}; expected "
                    f"{list(shape)} beside prompted {list(self.prompted.shape)}"
                )
        if self.marginal.ndim != 2 or len(self.marginal) != m:
            raise MeasurementError(
                f"marginal has shape {list(self.marginal.shape)}; expected one row for "
                f"each of {m} prompt tokens"
            )
        sums = self.marginal.sum(axis=1)
        if (sums > 1 + 1e-6).any():
            raise MeasurementError(
                f"marginal[{int(sums.argmax())}] sums to {sums.max():.6g}; only one "
                "rank can be right, so expected at most 1 (per rank, not cumulative)"
            )
        if np.abs(self.transitions.sum(axis=2) - 1).max() > 1e-6:
            raise MeasurementError("each row of transitions must sum to 1")

    @classmethod
    def of(
        cls, marginal: Any, source: Mapping[str, Any] | None = None
    ) -> AcceptanceModel:
        """Prompt rows alone: no bigram table, no n-gram matches.

        Args:
            marginal: [m, K], see the attribute.
            source: see the attribute.
        """
        table = _checked_numbers("marginal", marginal)
        m, k = table.shape
        return cls(
            prompted=table,
            unprompted=np.zeros(k),
            ngram=np.zeros((0, 0)),
            beside=np.zeros((0, m, k)),
            transitions=np.ones((2, 1, 1)),
            overall=np.concatenate([table, np.zeros((1, k))]),
            marginal=table,
            source=source or {},
        )

    @classmethod
    def typical(cls, num_prompt_tokens: int, num_ranks: int = 10) -> AcceptanceModel:
        """Probabilities between those of the paper's models and of small ones.

        The best rank is right with probability .40, .24, .15 ... at distance 1, 2, 3
        ... (Vicuna-7B: .48, .26, .16; MobileLLaMA: .35, .18, .12), lower ranks fall as
        a power. Without prompt tokens the bigram table's best is right with .20 (the
        demo model: .18). N-gram matches are those of `with_typical_ngrams`.
        """
        best = 0.4 * 0.6 ** np.arange(num_prompt_tokens)
        ranks = np.arange(1, num_ranks + 1.0) ** -1.3
        model = cls.of(best[:, None] * ranks)
        if not num_prompt_tokens:
            model = replace(model, unprompted=0.2 * ranks, overall=0.2 * ranks[None])
        return model.with_typical_ngrams()

    def with_typical_ngrams(self) -> AcceptanceModel:
        """The same with n-gram matches as in ordinary text, where none were measured.

        An n-gram draft is right about half of the time after a match of 2 or 3 tokens,
        three quarters after a longer one, and surer the further it has held.
        Transitions are about those of the demo model.
        """
        if len(self.ngram):
            return self
        ngram = [[0.45, 0.55, 0.6, 0.65, 0.65, 0.65], [0.7, 0.75, 0.8, 0.8, 0.8, 0.8]]
        return replace(
            self,
            ngram=np.array(ngram),
            beside=np.stack([0.7 * self.prompted] * 2),
            transitions=np.array(
                [
                    [[0.75, 0.2, 0.05], [0.65, 0.25, 0.1], [0.5, 0.15, 0.35]],
                    [[0.6, 0.3, 0.1], [0.45, 0.15, 0.4], [0.25, 0.1, 0.65]],
                ]
            ),
        )

    def without_ngram(self) -> AcceptanceModel:
        """The same where n-gram matches are not looked up."""
        m, k = self.prompted.shape
        return replace(
            self,
            prompted=self.overall[:-1],
            unprompted=self.overall[-1],
            ngram=np.zeros((0, 0)),
            beside=np.zeros((0, m, k)),
            transitions=np.ones((2, 1, 1)),
        )

    def without_bigram(self) -> AcceptanceModel:
        """The same without a bigram table, whose ranks the other fields describe."""
        shape = len(self.ngram), *self.marginal.shape
        return replace(
            self.of(self.marginal, self.source),
            ngram=self.ngram,
            beside=np.broadcast_to(0.7 * self.marginal, shape),
            transitions=self.transitions,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file completely or not at all; raises OSError."""
        content = {name: getattr(self, name).tolist() for name in _TABLES}
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        write_json(path, {**head, **content, "source": dict(self.source)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], num_prompt_tokens: int | None = None
    ) -> AcceptanceModel:
        """Read a file strictly.

        Args:
            path: the file.
            num_prompt_tokens: how many it must be about; None for any number.

        Raises:
            FormatError, MeasurementError: the message names the file.
        """
        content = read_json(
            path,
            kind="the acceptance model",
            format=FORMAT,
            version=FORMAT_VERSION,
            keys=_TABLES,
            optional=("source",),
            remedy=_REMEDY,
        )
        try:
            m, k = np.shape(content["prompted"])
            content["beside"] = np.reshape(content["beside"], (-1, m, k))
            if not content["ngram"]:
                content["ngram"] = np.zeros((0, 0))
            model = cls(**content)
        except (TypeError, ValueError) as error:
            raise MeasurementError(f"{path}: {error}; {_REMEDY}") from error
        if num_prompt_tokens not in (None, model.num_prompt_tokens):
            raise MeasurementError(
                f"{path} is about {model.num_prompt_tokens} prompt tokens, but the "
                f"folder holds {num_prompt_tokens}; {_REMEDY}"
            )
        return model

    @classmethod
    def of_folder(cls, folder: Path | None, num_prompt_tokens: int) -> AcceptanceModel:
        """The model measured for a prompt-token folder, else a typical one."""
        if folder is not None and (folder / ACCEPTANCE_FILE).exists():
            return cls.load(folder / ACCEPTANCE_FILE, num_prompt_tokens)
        return cls.typical(num_prompt_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompted)

    @property
    def num_classes(self) -> int:
        """Match classes, the one without a match included."""
        return len(self.ngram) + 1

    def max_depth(self, match_class: int) -> int:
        """Depth below which no draft token is worth a row."""
        deepest = self.num_prompt_tokens
        if self.unprompted.any():
            deepest += BEYOND
        return max(deepest, self.ngram.shape[1] if match_class else 0)

    def probabilities(
        self, num_prompted: int, match_class: int, depth: int, on_ngram: bool
    ) -> np.ndarray:
        """[K] or [K + 1] acceptance probability of each rank at `depth` (from 1).

        Args:
            num_prompted: how deep the prompt rows of the last step reach.
            match_class: 0 for no n-gram match.
            depth: of the draft token.
            on_ngram: the parent is on the n-gram draft, so rank 0 continues it.
        """
        prompted = depth <= min(num_prompted, self.num_prompt_tokens)
        ranks = self.prompted[depth - 1] if prompted else self.unprompted
        if depth > self.num_prompt_tokens + BEYOND:
            ranks = np.zeros_like(ranks)
        if not on_ngram or match_class == 0:
            return ranks
        ngram = self.ngram[match_class - 1]
        right = ngram[depth - 1] if depth <= len(ngram) else 0.0
        if prompted:
            ranks = self.beside[match_class - 1, depth - 1]
        return np.concatenate([[right], (1 - right) * ranks])


def _checked_numbers(name: str, values: Any) -> np.ndarray:
    """`values` as float64, all of them probabilities."""
    try:
        raw = np.asarray(values)
        # Text, booleans and objects convert to floats too; none of them is meant.
        if raw.size and raw.dtype.kind not in "fiu":
            raise ValueError(f"its values are of type {raw.dtype}")
        table = np.array(raw, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MeasurementError(
            f"{name} is not a table of numbers ({str(error).splitlines()[0]})"
        ) from error
    if not ((table >= 0) & (table <= 1 + 1e-6)).all():
        raise MeasurementError(f"{name} holds values outside [0, 1]")
    return table
