"""What a calibration learns about candidates by where they stand.

At each insertion point the true continuation is known, so for every candidate list
that serving could make there (from a prompt row and the bigram table, from the
table alone, beside a chain) the place of the true token under the true parent is
found. `evidence_rates` makes chances of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm_ppd.calibrate.rates import Texts, TriedPoints, settled_evidence
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve, default_profile
from vllm_ppd.train.continuation import Continuation
from vllm_ppd.trees.bigram import BigramTable, BigramTensors
from vllm_ppd.trees.drafting import rank_children
from vllm_ppd.trees.ngram import match_ngram

__all__ = ["AcceptanceCounts"]

# Weights of the bigram table's gain that are tried.
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


class AcceptanceCounts:
    """Points of texts; feed texts, their points and logits, then take `acceptance`.

    Points of a text should be neighbours, so that steps can be followed.

    Args:
        num_prompt_tokens: m.
        num_ranks: K.
        table: the bigram table; None without one.
        latency: seconds of a step by rows, of a machine like that which will serve, for
            steps begin where its trees fail; a typical CPU's by default.
        num_ept: rows per prompt token.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        num_ranks: int,
        table: BigramTable | None,
        latency: LatencyCurve | None = None,
        num_ept: int = 1,
    ):
        self.m, self.k = num_prompt_tokens, num_ranks
        self._table = None if table is None else BigramTensors.of(table)
        self._weights = WEIGHTS if table else (0.0,)
        self._latency = latency or default_profile("cpu").curve(1)
        self._num_ept = num_ept
        # A point has m true tokens after its root.
        self._texts = Texts(num_prompt_tokens)
        self._points: list[TriedPoints] = []
        self._settled: tuple[AcceptanceModel, tuple[int, ...]] | None = None

    def add_texts(self, continuation: Continuation) -> None:
        """The texts of the next points, and their matches."""
        self._tokens = continuation.tokens.cpu().numpy()
        shape = self._tokens.shape
        class_at = np.zeros(shape, dtype=np.int64)
        # Tokens of the chain that are right, and the one after them, which is wrong.
        self._right_at = np.zeros(shape, dtype=np.int64)
        self._wrong_at = np.full(shape, -1)
        first = np.zeros(len(self._tokens), dtype=np.int64)
        end = np.zeros(len(self._tokens), dtype=np.int64)
        for index, written in enumerate(continuation.written.cpu().numpy()):
            own = np.flatnonzero(written)
            if len(own) < 2:
                continue
            first[index], end[index] = own[0], own[-1] + 1
            text = self._tokens[index, : own[-1] + 1]
            for root in range(own[0], own[-1]):
                class_at[index, root] = self._look_at(index, text, root)
        self._class_at, self._first = class_at, first
        self._first_text = self._texts.add(class_at, first, end)

    def _look_at(self, index: int, text: np.ndarray, root: int) -> int:
        match_class, chain = match_ngram(text[: root + 1])
        future = text[root + 1 : root + 1 + len(chain)]
        wrong = np.flatnonzero(chain[: len(future)] != future)
        self._right_at[index, root] = wrong[0] if len(wrong) else len(future)
        if len(wrong):
            self._wrong_at[index, root] = chain[wrong[0]]
        return match_class

    def add_points(self, sequence: torch.Tensor, target: torch.Tensor) -> None:
        """Points of those texts whose logits come next.

        sequence [V, 1], target [V, m]: text, and rows p + d of it.
        """
        rows, targets = sequence[:, 0].cpu().numpy(), target.cpu().numpy()
        self._rows, self._roots = rows, targets[:, 0]
        # [V, m] the chain's token where it is wrong after having been right; else -1.
        depth = np.arange(self.m) == self._right_at[rows, self._roots][:, None]
        self._wrong = np.where(depth, self._wrong_at[rows, self._roots][:, None], -1)
        tokens = self._tokens
        self._parents = torch.from_numpy(tokens[rows[:, None], targets])
        self._truth = torch.from_numpy(tokens[rows[:, None], targets + 1])
        # The truth's place in each list: with every weight, beside a chain too.
        shape = len(self._weights), *targets.shape
        self._place = np.full(shape, self.k)
        self._place_beside = np.full(shape, self.k)

    def add_logits(self, first: int, logits: torch.Tensor) -> None:
        """float32 [n, V] of the points' prompt rows from flat index `first` on."""
        at = np.arange(first, first + len(logits))
        point, distance = at // self.m, at % self.m
        parents = self._parents[point, distance]
        truth = self._truth[point, distance].numpy()
        wrong = self._wrong[point, distance]
        some = np.flatnonzero(wrong >= 0)
        logits = logits.cpu()
        for index, weight in enumerate(self._weights):
            ids = rank_children(logits, parents, self._table, weight, self.k)
            self._place[index, point, distance] = _rank_in(ids.numpy(), truth)
            if len(some):
                ids = rank_children(
                    logits[some],
                    parents[some],
                    self._table,
                    weight,
                    self.k,
                    torch.from_numpy(wrong[some]),
                )
                rank = _rank_in(ids.numpy(), truth[some])
                self._place_beside[index, point[some], distance[some]] = rank

    def end_points(self) -> None:
        """Keep the points, now that all their logits are there."""
        rows, roots = self._rows, self._roots
        right, wrong = self._right_at[rows, roots], self._wrong_at[rows, roots]
        # Where the chain ends the token before is true; there is none after a text.
        behind = np.minimum(roots + right, self._tokens.shape[1] - 2)
        nothing = np.full(len(rows), -1)
        self._points.append(
            TriedPoints(
                text=self._first_text + rows,
                root=roots,
                # The first point of a text has the second token of its own as root.
                fresh=roots == self._first[rows] + 1,
                match_class=self._class_at[rows, roots],
                right=right,
                tried=right + (wrong >= 0),
                prompted=self._place,
                beside=self._place_beside,
                alone=self._alone(rows, roots, nothing),
                beside_alone=np.where(
                    wrong >= 0, self._alone(rows, behind, wrong), self.k
                ),
            )
        )
        self._settled = None

    def _alone(
        self, rows: np.ndarray, roots: np.ndarray, excluded: np.ndarray
    ) -> np.ndarray:
        """[V] place of the next token among the bigram of those at `roots`."""
        if self._table is None:
            return np.full(len(rows), self.k)
        parents = torch.from_numpy(self._tokens[rows, roots])
        left_out = torch.from_numpy(excluded)
        ids = rank_children(None, parents, self._table, 0.0, self.k, left_out)
        return _rank_in(ids.numpy(), self._tokens[rows, roots + 1])

    def weights(self) -> tuple[float, ...]:
        """[m] the best weight of the table's gain for each prompt token."""
        return tuple(self._weights[index] for index in self._settle()[1])

    def acceptance(self, source: dict[str, Any]) -> AcceptanceModel:
        """Rates where steps begin, with the best weights."""
        return replace(self._settle()[0], source=source)

    def _settle(self) -> tuple[AcceptanceModel, tuple[int, ...]]:
        if self._settled is None:
            points = TriedPoints.joined(self._points)
            self._settled = settled_evidence(
                points, self._texts, self.k, self._latency, self._num_ept
            )
        return self._settled


def _rank_in(lists: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N] place of the truth in each list [N, K]; K where it is not there."""
    same = lists == truth[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1), lists.shape[1])
