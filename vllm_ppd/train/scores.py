"""Accuracy of prompt tokens' predictions, counted per distance."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

TOP = 10
"""The wider of the two accuracies reported, as in the paper."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Sums over predictions, per distance 1..m; they add up over batches."""

    points: torch.Tensor
    """int64 [m]: predictions made."""
    kl: torch.Tensor
    """float64 [m]: KL(target || prompt) in nats."""
    model_top1: torch.Tensor
    """int64 [m]: the frozen model's argmax was the best rank."""
    model_top10: torch.Tensor
    """int64 [m]: the frozen model's argmax was among the ten best ranks."""
    labelled: torch.Tensor
    """int64 [m]: predictions with a true token inside the sequence."""
    true_top1: torch.Tensor
    """int64 [m]: the true token was the best rank."""
    true_top10: torch.Tensor
    """int64 [m]: the true token was among the ten best ranks."""
    greedy: torch.Tensor
    """int64 [m]: predictions on the greedy path: the text between the root and the
    predicted token is what the model itself would have written."""
    greedy_top1: torch.Tensor
    """int64 [m]: as model_top1, on the greedy path: what greedy decoding accepts."""
    greedy_top10: torch.Tensor
    """int64 [m]: as model_top10, on the greedy path."""

    @classmethod
    def zeros(cls, distances: int) -> Scores:
        zeros = {field.name: torch.zeros(distances).long() for field in fields(cls)}
        return cls(**{**zeros, "kl": torch.zeros(distances).double()})

    def __add__(self, other: Scores) -> Scores:
        names = [field.name for field in fields(self)]
        return Scores(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def summary(self) -> dict[str, list[float]]:
        """Means per distance 1..m: KL in nats, accuracies in 0..1; 0 without data."""
        totals = {"model": self.points, "true": self.labelled, "greedy": self.greedy}
        means = {"kl": self.kl / self.points.clamp(min=1)}
        for name, total in totals.items():
            for key in (f"{name}_top1", f"{name}_top10"):
                means[key] = getattr(self, key) / total.clamp(min=1).double()
        return {key: mean.tolist() for key, mean in means.items()}


@torch.no_grad()
def token_rank(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """int64 [n]: how many tokens come before `token` [n] in `logits` [n, vocabulary].

    Ties go to the lower id, as argmax has it; half-precision logits do tie.
    """
    own = logits.gather(1, token[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < token[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
