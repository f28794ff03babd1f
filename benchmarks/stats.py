"""The arithmetic of a comparison: medians with their spread, and ratios per round.

Decoders alternate (A B C A B C ...), so a ratio is taken within a round, where the
machine was in one state, and only then summarised over rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """A median and the extremes around it; with few rounds, quartiles say less."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError without values."""
        if not values:
            raise ValueError("a median needs at least one value")
        return cls(median(values), min(values), max(values))

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        return {name: round(value, digits) for name, value in asdict(self).items()}


def ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Round by round, `values` over `baseline`.

    Raises ValueError when the two have different numbers of rounds.
    """
    return [value / base for value, base in zip(values, baseline, strict=True)]


@dataclass(frozen=True)
class Sameness:
    """How one decoder's greedy token ids compare with plain vLLM's."""

    identical: int
    requests: int
    first_difference: int | None
    """Smallest position, from 0, at which a request differs."""

    @classmethod
    def of(
        cls, ours: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]
    ) -> Sameness:
        """Compares ids and lengths, request by request."""
        differences = []
        for a, b in zip(ours, plain, strict=True):
            if tuple(a) != tuple(b):
                pairs = enumerate(zip(a, b, strict=False))
                shorter = min(len(a), len(b))
                differences.append(next((i for i, (x, y) in pairs if x != y), shorter))
        return cls(
            len(plain) - len(differences), len(plain), min(differences, default=None)
        )


def summarise(
    rounds: Mapping[str, Sequence[Mapping[str, float]]], baseline: str = "plain"
) -> dict[str, dict[str, dict[str, float]]]:
    """Per decoder, the spread of every figure and of its speed against `baseline`.

    rounds: for each decoder one dict of figures per round, with "tokens_per_s" among
    them. Without the baseline there are no ratios.
    """
    base = [figures["tokens_per_s"] for figures in rounds.get(baseline, ())]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, measured in rounds.items():
        found[name] = {
            figure: Spread.of([one[figure] for one in measured]).to_dict()
            for figure in measured[0]
        }
        if base:
            speeds = [one["tokens_per_s"] for one in measured]
            found[name]["ratio"] = Spread.of(ratios(speeds, base)).to_dict()
    return found
