"""One comparison of decoding with guesses and without, a block of steps each in turn.

A machine is now faster, now slower, for seconds at a time. Blocks are short, so both
ways to decode see the same of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from vllm_ppd.adaptive.prompt_cost import seconds_per_row
from vllm_ppd.adaptive.step_timing import RowSteps, mean_rows

__all__ = ["BLOCK", "HOPELESS", "OTHER_BLOCKS", "Look", "MeanStep", "TimedStep"]

# Steps of a block that count, and blocks of the way to decode that is not in use. As
# many of the one in use lie between and before them.
BLOCK, OTHER_BLOCKS = 16, 3
# Steps of each without which a look says nothing.
_LEAST = BLOCK // 2
# DraftInputs are given up after a block if they are that much slower; those in use only
# if the block has so many requests in all that it cannot be the text of a few.
HOPELESS, _MANY = 0.9, 256
# A step now and then waits for something else and takes more than so many medians.
# Plain steps are all alike; of others some may have guesses, and those take longer.
_OUTLIER = {True: 4.0, False: 2.0}
# How many more requests one way may have had than the other, in the mean. Where they
# end during a look, the way that comes later has fewer, and seems slower; then only
# steps with about as many as the median step count.
_SAME_LOAD = 1.05
# Of a step's time that is left at least when what its prompts cost is taken away.
_LEAST_SHARE = 0.1


class TimedStep(NamedTuple):
    """A step as the clock saw it."""

    seconds: float
    tokens: int
    rows: float
    """Per request."""
    prompt_rows: int
    """Of all requests, beside those."""
    running: int


class MeanStep(NamedTuple):
    """Steps of one way to decode, in the mean."""

    seconds: float
    row_steps: RowSteps
    bare_s: float
    """Seconds of those in which nobody guessed; 0 if there are none."""

    @property
    def rows(self) -> float:
        """Per request."""
        return mean_rows(self.row_steps)


class Look:
    """Steps of both ways to decode.

    Args:
        kept: the way in use, True with guesses.
        before: the last steps of it.
    """

    def __init__(self, kept: bool, before: Sequence[TimedStep]):
        self._kept = kept
        self._steps: dict[bool, list[TimedStep]] = {kept: [*before], not kept: []}
        # The block under way; every odd one is of the other way.
        self._block = 1

    @property
    def guessing(self) -> bool:
        """The way to decode in this block."""
        return self._kept == (self._block % 2 == 0)

    @property
    def says_something(self) -> bool:
        """Whether there are enough steps of both ways, with about as many requests."""
        return min(map(len, self._alike().values())) >= _LEAST

    def _alike(self) -> dict[bool, list[TimedStep]]:
        """The steps of each way, at the same load."""
        ways = self._steps.values()
        loads = [fmean(step.running for step in way) for way in ways if way]
        if max(loads) <= _SAME_LOAD * min(loads):
            return self._steps
        usual = median(step.running for way in ways for step in way)
        least, most = usual / _SAME_LOAD, usual * _SAME_LOAD
        return {
            guessing: [step for step in way if least <= step.running <= most]
            for guessing, way in self._steps.items()
        }

    def add(self, step: TimedStep) -> None:
        """Count a step of this block."""
        self._steps[self.guessing].append(step)

    def ends(self, prompt_row_s: float) -> bool:
        """At a block's end: whether that was the last one; else the next one begins."""
        if self._block >= 2 * OTHER_BLOCKS - 1:
            return True
        requests = sum(step.running for step in self._steps[not self._kept])
        enough = requests >= _MANY if self._kept else self.guessing
        if enough and self.says_something and self.ratio(prompt_row_s) < HOPELESS:
            return True
        self._block += 1
        return False

    def prompt_row_s(self) -> float | None:
        """Seconds that a prompt's row adds to a step; None if that cannot be seen.

        To plain steps, where they had prompts: what prompts cost more beside guesses is
        what guesses cost.
        """
        for guessing in (False, True):
            steps = self._alike()[guessing]
            rows = [step.prompt_rows for step in steps]
            found = seconds_per_row(rows, [step.seconds for step in steps])
            if found is not None:
                return found
        return None

    def ratio(self, prompt_row_s: float) -> float:
        """Tokens per second with guesses over those without."""
        speeds = []
        for guessing in (True, False):
            steps = self._undisturbed(guessing, prompt_row_s)
            seconds = sum(step.seconds for step in steps)
            speeds.append(sum(step.tokens for step in steps) / seconds)
        return speeds[0] / speeds[1]

    def mean_step(self, guessing: bool, prompt_row_s: float) -> MeanStep:
        """A step of one way to decode.

        The mean time, not the median: where only some steps have guesses, those are the
        long ones.
        """
        steps = self._undisturbed(guessing, prompt_row_s)
        bare = [step.seconds for step in steps if step.rows == 1]
        return MeanStep(
            fmean(step.seconds for step in steps),
            tuple(sorted(Counter(step.rows for step in steps).items())),
            fmean(bare) if bare else 0.0,
        )

    def _undisturbed(self, guessing: bool, prompt_row_s: float) -> list[TimedStep]:
        """As long as steps would have taken without prompts, and without those that
        waited for something else."""
        steps = []
        for step in self._alike()[guessing]:
            left = step.seconds - prompt_row_s * step.prompt_rows
            seconds = max(left, _LEAST_SHARE * step.seconds)
            steps.append(step._replace(seconds=seconds))
        most = _OUTLIER[guessing] * median(step.seconds for step in steps)
        return [step for step in steps if step.seconds <= most]
