"""What a calibration learns about candidates by where they stand.

At each insertion point the true continuation is known, so for every candidate list
that serving could make there (from a prompt row and the successor table, from the
table alone, beside a chain) the rank of the true token under the true parent is
counted. The rates are the chances of `vllm_ppd.evidence.Evidence`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_ppd.candidates import Successors, rank_children
from vllm_ppd.evidence import Evidence
from vllm_ppd.successors import SuccessorTable
from vllm_ppd.suffix import LENGTHS, MAX_CHAIN, match_chain
from vllm_ppd.train.continuation import Continuation

__all__ = ["EvidenceCounts"]

# Weights of the successor table's gain that are tried.
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
# The weight is chosen by how often the truth is among so many children.
_CHOSEN_BY = 4
# The next step's root lies about so many tokens on.
_STEP = 2


class EvidenceCounts:
    """Counts over points; feed batches, then take `evidence` and `weights`.

    Args:
        num_prompt_tokens: m.
        num_ranks: K.
        table: the successor table; None without one.
    """

    def __init__(
        self, num_prompt_tokens: int, num_ranks: int, table: SuccessorTable | None
    ):
        self.m, self.k = num_prompt_tokens, num_ranks
        self._table = None if table is None else Successors.of(table)
        self._weights = WEIGHTS if table else (0.0,)
        classes, tries = len(LENGTHS), len(self._weights)
        # Axis 0 of the next two: no match, a match.
        self._ranks = np.zeros((2, tries, self.m, self.k + 1))
        self._alone = np.zeros((2, self.k + 1))
        self._beside = np.zeros((tries, classes, self.m, self.k + 1))
        self._chain_tries = np.zeros((classes, MAX_CHAIN))
        self._chain_hits = np.zeros((classes, MAX_CHAIN))
        self._moves = np.zeros((classes + 1, classes + 1))

    def add_points(
        self, continuation: Continuation, sequence: torch.Tensor, target: torch.Tensor
    ) -> None:
        """The points of the next logits: sequence [V, 1], target [V, m] rows p + d."""
        tokens = continuation.tokens.cpu().numpy()
        ends = tokens.shape[1] - continuation.written.flip(1).cpu().int().argmax(1)
        rows, targets = sequence[:, 0].cpu().numpy(), target.cpu().numpy()
        count = len(rows)
        self._classes = np.zeros(count, dtype=np.int64)
        # [V, m] the chain's token where it is wrong after having been right; else -1.
        self._wrong = np.full((count, self.m), -1)
        self._parents = torch.from_numpy(tokens[rows[:, None], targets])
        self._truth = torch.from_numpy(tokens[rows[:, None], targets + 1])
        for point in range(count):
            text, root = tokens[rows[point]], int(targets[point, 0])
            future = text[root + 1 : int(ends[rows[point]])]
            match_class, chain = match_chain(text[: root + 1])
            self._classes[point] = match_class
            if len(future) > _STEP:
                after, _ = match_chain(text[: root + 1 + _STEP])
                self._moves[match_class, after] += 1
            if not match_class:
                continue
            known = min(len(chain), len(future))
            wrong = np.flatnonzero(chain[:known] != future[:known])
            right = int(wrong[0]) if len(wrong) else known
            self._chain_hits[match_class - 1, :right] += 1
            self._chain_tries[match_class - 1, : min(right + 1, known)] += 1
            if right < min(known, self.m):
                self._wrong[point, right] = chain[right]
        if self._table is not None:
            lists = rank_children(
                None, self._parents[:, 0], self._table, 0.0, self.k
            ).numpy()
            rank = _rank_in(lists, self._truth[:, 0].numpy())
            np.add.at(self._alone, ((self._classes > 0).astype(int), rank), 1)

    def add_logits(self, first: int, logits: torch.Tensor) -> None:
        """float32 [n, V] of the points' prompt rows from flat index `first` on."""
        at = np.arange(first, first + len(logits))
        point, distance = at // self.m, at % self.m
        parents = self._parents[point, distance]
        truth = self._truth[point, distance].numpy()
        matched = (self._classes[point] > 0).astype(int)
        wrong = self._wrong[point, distance]
        some = np.flatnonzero(wrong >= 0)
        logits = logits.cpu()
        for index, weight in enumerate(self._weights):
            ids = rank_children(logits, parents, self._table, weight, self.k)
            rank = _rank_in(ids.numpy(), truth)
            np.add.at(self._ranks[:, index], (matched, distance, rank), 1)
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
                classes = self._classes[point[some]] - 1
                np.add.at(self._beside[index], (classes, distance[some], rank), 1)

    def weights(self) -> tuple[float, ...]:
        """[m] the best weight of the table's gain for each prompt token."""
        return tuple(self._weights[index] for index in self._best().tolist())

    def evidence(self, source: dict[str, Any]) -> Evidence:
        """Rates of everything counted, with the best weights."""
        best, distance = self._best(), np.arange(self.m)
        ranks = self._ranks[:, best, distance]  # [2, m, K + 1]
        beside = self._beside[best, :, distance].swapaxes(0, 1)  # [C, m, K + 1]
        alone = self._alone  # [2, K + 1]
        moves = self._moves + 1e-3
        overall = np.concatenate([ranks.sum(0), self._alone.sum(0)[None]])
        return Evidence(
            prompted=_rates(ranks[0] if ranks[0].sum() else ranks.sum(0)),
            unprompted=_rates(alone[0] if alone[0].sum() else alone.sum(0)),
            chain=self._chain_hits / np.maximum(self._chain_tries, 1),
            beside=_rates(beside),
            moves=moves / moves.sum(axis=1, keepdims=True),
            overall=_rates(overall),
            source=source,
        )

    def _best(self) -> np.ndarray:
        among = self._ranks[..., :_CHOSEN_BY].sum(axis=(0, 3))  # [tries, m]
        return among.argmax(axis=0)


def _rank_in(lists: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N] place of the truth in each list [N, K]; K where it is not there."""
    same = lists == truth[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1), lists.shape[1])


def _rates(counts: np.ndarray) -> np.ndarray:
    """Counts [..., K + 1], the last one for misses, as rates [..., K]."""
    return counts[..., :-1] / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
