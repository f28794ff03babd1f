"""Whether prompt rows' own probabilities can be believed.

Every candidate comes with the probability that its prompt row gave it. Candidates of
similar probability are put into one bin, and the mean probability of a bin is held
against the share of its candidates that were right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["EDGES", "Reliability"]

EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10)))
"""Between the bins; denser where most candidates are."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums per distance and bin, each [m, bins]; they add up over batches."""

    count: torch.Tensor
    """int64: candidates."""
    right: torch.Tensor
    """int64: candidates that were the true token."""
    predicted: torch.Tensor
    """float64: probabilities, added up."""

    @classmethod
    def zeros(cls, distances: int) -> Reliability:
        shape = (distances, len(EDGES) + 1)
        whole = torch.zeros(shape, dtype=torch.int64)
        return cls(whole, whole, torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def of(
        cls, distances: int, at: torch.Tensor, values: torch.Tensor, rank: torch.Tensor
    ) -> Reliability:
        """Of n predictions.

        `at` int64 [n] is their distance (from 0), `values` [n, K] the probabilities of
        their K best candidates, best first, and `rank` int64 [n] that of the truth.
        """
        edges = torch.tensor(EDGES, device=values.device)
        bins = torch.bucketize(values, edges, right=True)
        index = (at[:, None] * (len(EDGES) + 1) + bins).flatten().cpu()
        right = torch.arange(values.shape[1], device=rank.device) == rank[:, None]

        def total(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            zeros = torch.zeros(distances * (len(EDGES) + 1), dtype=dtype)
            summed = zeros.index_add(0, index, numbers.flatten().cpu().to(dtype))
            return summed.view(distances, -1)

        return cls(
            count=total(torch.ones_like(bins), torch.int64),
            right=total(right, torch.int64),
            predicted=total(values, torch.float64),
        )

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.count + other.count,
            self.right + other.right,
            self.predicted + other.predicted,
        )

    def errors(self, points: int) -> list[float]:
        """Per distance: probability that lies in the wrong bin's favour, per point.

        Sum over bins of |predicted - right| over the number of points; 0 is perfect.
        """
        off = (self.predicted - self.right).abs().sum(dim=1)
        return (off / max(1, points)).tolist()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Per distance, its bins that hold anything: means and counts."""
        found = []
        for count, right, predicted in zip(
            self.count, self.right, self.predicted, strict=True
        ):
            used = count > 0
            found.append(
                {
                    "predicted": (predicted[used] / count[used]).tolist(),
                    "observed": (right[used] / count[used]).tolist(),
                    "count": count[used].tolist(),
                }
            )
        return found
