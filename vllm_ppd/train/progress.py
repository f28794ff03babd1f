"""The progress bar of a training run: steps, or seconds where time is the budget."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tqdm import tqdm

from vllm_ppd.train.scores import Scores
from vllm_ppd.train.settings import TrainSettings

__all__ = ["Moment", "joined", "training_bar"]


@dataclass(frozen=True)
class Moment:
    """What the bar says besides how far the run is."""

    step: int
    start: float
    """time.monotonic() at the run's start."""
    loss: float
    """Smoothed."""
    scores: Scores
    """Of a recent batch."""
    positions_per_second: float
    """Supervised predictions."""
    tokens_per_second: float

    def show(self, bar: tqdm) -> None:
        """Move the bar, without drawing it more often than it wants to be."""
        if bar.disable:
            return
        summary = self.scores.summary()
        bar.set_postfix_str(
            f"loss {self.loss:.3f}, top-1 {joined(summary['model_top1'], '.2f')}, "
            f"top-10 {joined(summary['model_top10'], '.2f')}, "
            f"{self.positions_per_second:.0f} pos/s, "
            f"{self.tokens_per_second:.0f} tok/s",
            refresh=False,
        )
        done = self.step
        if bar.unit == "s":
            done = min(int(time.monotonic() - self.start), bar.total)
        bar.update(done - bar.n)


def training_bar(
    settings: TrainSettings, step: int, seconds: float, disable: bool
) -> tqdm:
    """A bar over the budget of `settings`, from `step` or the `seconds` used so far."""
    minutes = settings.minutes
    return tqdm(
        total=settings.steps if minutes is None else round(60 * minutes),
        initial=step if minutes is None else int(seconds),
        unit="step" if minutes is None else "s",
        desc="training",
        disable=disable,
        dynamic_ncols=True,
    )


def joined(values: list[float], spec: str) -> str:
    """Numbers, one per distance."""
    return " ".join(format(value, spec) for value in values)
