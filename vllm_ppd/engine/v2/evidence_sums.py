"""How often guesses came true, summed on the device since the engine started."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from vllm_ppd.adaptive.learning import Places
from vllm_ppd.kernels.evidence_counts import count_evidence
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_walk import Walk

__all__ = ["EvidenceSums", "Sums"]


class Sums(NamedTuple):
    """Parts of the sums on the host. P places, C match classes."""

    tries: np.ndarray  # [P]
    hits: np.ndarray  # [P]
    moves: np.ndarray  # [2, C + 1, C + 1]
    tokens: np.ndarray  # [1]


class EvidenceSums:
    """Sums of one engine, in one tensor so that one copy brings them all.

    Args:
        places: of the learner that they are for.
        device: where requests are.

    Attributes:
        values: int64, to be taken apart by `parts`.
    """

    def __init__(self, places: Places, device: torch.device):
        self._places = places
        self._size = int(places.firsts[-1])
        self._classes = places.classes + 1
        # The entry after tries and that after hits are bins.
        moves = 2 * self._classes**2
        size = 2 * (self._size + 1) + moves + 1
        self.values = torch.zeros(size, dtype=torch.int64, device=device)
        ends = np.cumsum([self._size + 1, self._size + 1, moves])
        self._ends = tuple(ends.tolist())
        self._tries, self._hits, self._moves, self._tokens = self.values.tensor_split(
            self._ends
        )

    def add_walk(
        self,
        tables: DeviceTables,
        tree_states: torch.Tensor,
        tree_classes: torch.Tensor,
        trees: torch.Tensor,
        num_rows: torch.Tensor,
        walk: Walk,
    ) -> None:
        """Count a step; arguments of `count_evidence`."""
        count_evidence(
            self._tries,
            self._hits,
            self._places,
            tables,
            tree_states,
            tree_classes,
            trees,
            num_rows,
            walk,
        )
        self._tokens += walk.num_sampled.sum()

    def add_moves(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        counts: torch.Tensor,
        accepted: torch.Tensor,
    ) -> None:
        """Count requests' match classes and those that followed.

        Args:
            before, after: int [B]; -1 where there is none.
            counts: int64 [B] how often each counts.
            accepted: bool [B] whether the step between them accepted a guess.
        """
        known = (before >= 0) & (after >= 0)
        row = accepted.long() * self._classes + before
        place = torch.where(known, row * self._classes + after, 0).long()
        self._moves.scatter_add_(0, place, torch.where(known, counts, 0))

    def add_ends(
        self, before: torch.Tensor, after: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Count match classes of requests that ended, and of those in their place.

        Whether their last steps accepted anything is not known: each counts for both.
        """
        for accepted in (torch.zeros_like, torch.ones_like):
            self.add_moves(before, after, counts, accepted(before, dtype=torch.bool))

    def parts(self, values: np.ndarray) -> Sums:
        """Take apart what was copied to the host."""
        tries, hits, moves, tokens = np.split(values, self._ends)
        shape = 2, self._classes, self._classes
        return Sums(tries[:-1], hits[:-1], moves.reshape(shape), tokens)
