"""What a calibration learns about candidates by where they stand.

At each insertion point the true continuation is known, so for every candidate list
that serving could make there (from a prompt row and the successor table, from the
table alone, beside a chain) the rank of the true token under the true parent is
counted, weighted by how likely a step is to begin there. The rates are the chances of
`vllm_ppd.evidence.Evidence`.
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
from vllm_ppd.train.step_starts import accepted_guesses, step_starts

__all__ = ["EvidenceCounts"]

# Weights of the successor table's gain that are tried.
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
# The weight is chosen by how often the truth is among so many children.
_CHOSEN_BY = 4
# Less than any weight of a point.
_NEVER = 1e-9


class EvidenceCounts:
    """Counts over points; feed texts, their points and logits, then take `evidence`.

    Points of a text should be neighbours, so that steps can be followed.

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
        # Axis 0 of the next two: no match, a match, and either with steps as they are
        # where matches are not looked for.
        self._ranks = np.zeros((3, tries, self.m, self.k + 1))
        self._alone = np.zeros((3, self.k + 1))
        self._beside = np.zeros((tries, classes, self.m, self.k + 1))
        self._chain_tries = np.zeros((classes, MAX_CHAIN))
        self._chain_hits = np.zeros((classes, MAX_CHAIN))
        # Axis 0: the step accepted a guess.
        self._moves = np.zeros((2, classes + 1, classes + 1))

    def add_texts(self, continuation: Continuation) -> None:
        """The texts of the next points, and their matches."""
        self._tokens = continuation.tokens.cpu().numpy()
        shape = self._tokens.shape
        self._class_at = np.zeros(shape, dtype=np.int64)
        # Tokens of the chain that are right, and the one after them, which is wrong.
        self._right_at = np.zeros(shape, dtype=np.int64)
        self._wrong_at = np.full(shape, -1)
        self._first = np.zeros(len(self._tokens), dtype=np.int64)
        self._end = np.zeros(len(self._tokens), dtype=np.int64)
        for index, written in enumerate(continuation.written.cpu().numpy()):
            own = np.flatnonzero(written)
            if len(own) < 2:
                continue
            self._first[index], self._end[index] = own[0], own[-1] + 1
            text = self._tokens[index, : own[-1] + 1]
            for root in range(own[0], own[-1]):
                self._look_at(index, text, root)

    def _look_at(self, index: int, text: np.ndarray, root: int) -> None:
        match_class, chain = match_chain(text[: root + 1])
        future = text[root + 1 : root + 1 + len(chain)]
        wrong = np.flatnonzero(chain[: len(future)] != future)
        self._class_at[index, root] = match_class
        self._right_at[index, root] = wrong[0] if len(wrong) else len(future)
        if len(wrong):
            self._wrong_at[index, root] = chain[wrong[0]]

    def add_points(self, sequence: torch.Tensor, target: torch.Tensor) -> None:
        """Points of those texts whose logits come next.

        sequence [V, 1], target [V, m]: text, and rows p + d of it.
        """
        rows, targets = sequence[:, 0].cpu().numpy(), target.cpu().numpy()
        self._rows, self._roots = rows, targets[:, 0]
        self._classes = self._class_at[rows, self._roots]
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
        """Count the points, now that all their logits are there."""
        rows, roots = self._rows, self._roots
        right = self._right_at[rows, roots]
        guessed = accepted_guesses(self._place[len(self._weights) // 2])
        apart = (np.diff(rows) != 0) | (np.diff(roots) != 1)
        runs = np.split(np.arange(len(rows)), np.flatnonzero(apart) + 1)
        with_chains = np.where(right > 0, right, guessed) + 1
        starts = np.concatenate([step_starts(with_chains[run]) for run in runs])
        without = np.concatenate([step_starts(guessed[run] + 1) for run in runs])
        matched = (self._classes > 0).astype(int)
        point, distance = np.divmod(np.arange(self._truth.numel()), self.m)
        wrong = self._wrong >= 0
        for index in range(len(self._weights)):
            place = self._place[index].ravel()
            where = matched[point], distance, place
            np.add.at(self._ranks[:, index], where, starts[point])
            np.add.at(self._ranks[2, index], (distance, place), without[point])
            beside, depth = np.nonzero(wrong)
            where = self._classes[beside] - 1, depth, self._place_beside[index][wrong]
            np.add.at(self._beside[index], where, starts[beside])
        if self._table is not None:
            parents = self._parents[:, 0]
            lists = rank_children(None, parents, self._table, 0.0, self.k).numpy()
            rank = _rank_in(lists, self._truth[:, 0].numpy())
            np.add.at(self._alone, (matched, rank), starts)
            np.add.at(self._alone[2], rank, without)
        self._count_steps(starts, with_chains)

    def _count_steps(self, starts: np.ndarray, advances: np.ndarray) -> None:
        """Chains, and moves between match classes.

        After the end of a text another one begins, where matches are rare: a step of
        n tokens is the last one of a text of N with chance n / N.
        """
        rows, roots, classes = self._rows, self._roots, self._classes
        for point in np.flatnonzero(starts).tolist():
            row, root, begin = rows[point], roots[point], starts[point]
            match_class, advance = classes[point], advances[point]
            if match_class:
                right = self._right_at[row, root]
                tried = right + (self._wrong_at[row, root] >= 0)
                self._chain_hits[match_class - 1, :right] += begin
                self._chain_tries[match_class - 1, :tried] += begin
            first, end = self._first[row], self._end[row]
            last = min(1.0, advance / (end - first))
            then = self._class_at[row, min(root + advance, end - 2)]
            moves = self._moves[int(advance > 1), match_class]
            moves[then] += begin * (1 - last)
            moves[self._class_at[row, first]] += begin * last

    def weights(self) -> tuple[float, ...]:
        """[m] the best weight of the table's gain for each prompt token."""
        return tuple(self._weights[index] for index in self._best().tolist())

    def evidence(self, source: dict[str, Any]) -> Evidence:
        """Rates of everything counted, with the best weights."""
        best, distance = self._best(), np.arange(self.m)
        ranks = self._ranks[:, best, distance]  # [3, m, K + 1]
        beside = self._beside[best, :, distance].swapaxes(0, 1)  # [C, m, K + 1]
        alone = self._alone  # [3, K + 1]
        moves = self._moves + 1e-3
        overall = np.concatenate([ranks[2], alone[2:]])
        return Evidence(
            prompted=_rates(ranks[0] if ranks[0].sum() else ranks[2]),
            unprompted=_rates(alone[0] if alone[0].sum() else alone[2]),
            chain=self._chain_hits / np.maximum(self._chain_tries, _NEVER),
            beside=_rates(beside),
            moves=moves / moves.sum(axis=2, keepdims=True),
            overall=_rates(overall),
            source=source,
        )

    def _best(self) -> np.ndarray:
        among = self._ranks[2, ..., :_CHOSEN_BY].sum(axis=2)  # [tries, m]
        return among.argmax(axis=0)


def _rank_in(lists: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N] place of the truth in each list [N, K]; K where it is not there."""
    same = lists == truth[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1), lists.shape[1])


def _rates(counts: np.ndarray) -> np.ndarray:
    """Counts [..., K + 1], the last one for misses, as rates [..., K]."""
    return counts[..., :-1] / np.maximum(counts.sum(axis=-1, keepdims=True), _NEVER)
