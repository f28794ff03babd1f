"""Whether speculation really pays at this load: measured, not predicted.

Plans come from a profile and from chances, and both can be off, most of all where many
requests share a step. So a serving engine compares: now and then it decodes with and
without guesses in turn, for a hundred steps, and stays with what brought more tokens
per second. A wrong plan then costs the looks, a few per cent for a while, then less.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from vllm_ppd.adaptive.guess_tally import GuessTally
from vllm_ppd.adaptive.speed_look import (
    BLOCK,
    HOPELESS,
    OTHER_BLOCKS,
    Look,
    MeanStep,
    TimedStep,
)
from vllm_ppd.adaptive.step_timing import StepTiming

__all__ = ["LoadGuard"]

# Steps after a switch that are not counted: guesses have to be built up first, and the
# first ones may come a step late.
_SETTLING = 2
# Steps between comparisons: as many again each time that the answer stays the same, and
# so many that looking at the slower way costs about this share of the time.
_FIRST_WAIT, _LONGEST_WAIT = 256, 8192
_BUDGET = 0.01
# How much faster guessing has to look to go on, and to begin again: noise should not
# decide, and with 3 and 5 % guesses stayed on at 16 and 32 requests, where they were
# behind in the long run (benchmarks/results/loads_at_0.7.json at commit 2f198ef).
_STAY, _RETURN = 1.06, 1.08
# Where guesses bring so much fewer tokens per step than usual the traffic has changed
# and what was known of speeds is out of date. Looked at after so many steps that have
# so many requests together, for a single text is now easy, now hard to guess.
_FALLEN, _LOOK_STEPS, _LOOK_REQUESTS = 0.8, 32, 1024
# A step that also reads so many prompt rows per running request, or fewer, is compared
# all the same, without what those cost: on a full server that is most steps.
_PROMPT_ROWS = 8
# Looks at a way to decode whose times are remembered.
_LOOKS = 9


@dataclass
class _Load:
    """One range of running requests."""

    speculating: bool = True
    # The comparison under way.
    look: Look | None = None
    # Steps until that begins or its next block does, counted down.
    left: int = _SETTLING + BLOCK
    settling: int = _SETTLING
    wait: int = _FIRST_WAIT
    # The last ones of the way to decode that is in use.
    steps: deque[TimedStep] = field(default_factory=lambda: deque(maxlen=BLOCK))
    # With guesses over without, of the last two comparisons.
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    # Steps of both ways in the last looks, which say something of the machine.
    times: dict[bool, deque[MeanStep]] = field(
        default_factory=lambda: {way: deque(maxlen=_LOOKS) for way in (True, False)}
    )
    running: int = 1
    context: int = 1
    # Seconds that a prompt's row adds to a step; 0 until that was seen.
    prompt_row_s: float = 0.0
    # What guesses have brought since the speeds were last forgotten.
    tally: GuessTally = field(default_factory=GuessTally)
    # Tokens per request and step with guesses, usually; and steps, requests and tokens
    # since that was last looked at.
    usual: float | None = None
    lately: list[int] = field(default_factory=lambda: [0, 0, 0])

    @property
    def guessing(self) -> bool:
        """Whether steps may have guesses now."""
        return self.speculating if self.look is None else self.look.guessing

    def start_over(self) -> None:
        """Forget the speeds, and look at both ways to decode again, soon.

        The last steps are forgotten too: the change was somewhere among them.
        """
        self.look = None
        self.ratios.clear()
        self.steps.clear()
        self.tally = GuessTally()
        self.settling, self.left = _SETTLING, _SETTLING + BLOCK

    def count(self, step: TimedStep) -> None:
        """A step of the way to decode that is due."""
        if self.settling:
            self.settling -= 1
            return
        if self.look is None:
            self.steps.append(step)
        else:
            self.look.add(step)
        if self.guessing:
            self.tally.add(step.running, step.tokens, round(step.rows * step.running))

    def go_on(self) -> None:
        """Begin a look, or its next block, or choose by it."""
        if self.look is None:
            self.look = Look(self.speculating, self.steps)
        elif self.look.ends(self.prompt_row_s):
            look, self.look = self.look, None
            self.steps.clear()
            self.settling = _SETTLING
            if look.says_something:
                self._choose(look)
            else:
                # Loads that never stay the same are not looked at again and again.
                self.left, self.wait = self.wait, min(2 * self.wait, _LONGEST_WAIT)
            return
        self.settling, self.left = _SETTLING, _SETTLING + BLOCK

    def _choose(self, look: Look) -> None:
        """By this look and the one before it.

        What would change the answer is looked at once more, soon: guessing begins again
        when it paid twice, and ends when it does not pay in the mean of two looks, or
        at the first, by the tokens of many steps.
        """
        seen = look.prompt_row_s()
        if seen is not None:
            known = self.prompt_row_s
            self.prompt_row_s = (known + seen) / 2 if known else seen
        for way, times in self.times.items():
            times.append(look.mean_step(way, self.prompt_row_s))
        ratios, missing = self.ratios, 0.0
        if self.speculating:
            guessing, plain = self.times[True][-1], self.times[False][-1]
            ratios.append(self.tally.ratio(guessing, plain))
            short = _STAY - fmean(ratios)
            missing = self.tally.missing(short)
            differs, sure = ratios[-1] < _STAY, short > 0 and not missing
        else:
            ratios.append(look.ratio(self.prompt_row_s))
            differs = ratios[-1] >= _RETURN
            sure = len(ratios) == 2 and min(ratios) >= _RETURN
        if differs and not sure:
            self.left = max(_SETTLING + BLOCK, int(missing / self.running))
            return
        if differs:
            self.speculating = not self.speculating
            self.tally = GuessTally()
        wait = _FIRST_WAIT if differs else 2 * self.wait
        affordable = self._affordable_wait(ratios[-1])
        if differs and not self.speculating:
            ratios.clear()
        self.wait = self.left = min(max(wait, affordable), _LONGEST_WAIT)

    def _affordable_wait(self, ratio: float) -> int:
        """Steps before the next look at the other way, for what that will cost."""
        kept, other = self.speculating, not self.speculating
        worth = 1 / ratio if kept else ratio
        blocks = OTHER_BLOCKS if kept or worth >= HOPELESS else 1
        lost = (
            blocks * (_SETTLING + BLOCK) * self.times[other][-1].seconds * (1 - worth)
        )
        return int(lost / (_BUDGET * self.times[kept][-1].seconds))

    def falls(self, running: int, tokens: int) -> bool:
        """Count a step with guesses; whether they come true less often than usual."""
        lately = self.lately
        lately[:] = lately[0] + 1, lately[1] + running, lately[2] + tokens
        if lately[0] < _LOOK_STEPS or lately[1] < _LOOK_REQUESTS:
            return False
        now, usual = lately[2] / lately[1], self.usual
        fallen = usual is not None and now < _FALLEN * usual
        self.usual = now if usual is None or fallen else (usual + now) / 2
        lately[:] = 0, 0, 0
        return fallen


class LoadGuard:
    """Decides for each range of load: 1, 2, 3 to 4, 5 to 8, ... running requests, like
    a plan's tiers. A full server that now and then has one less stays in its range.

    Not for ranks that must agree: each would believe its own clock.

    Args:
        clock: seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._loads: dict[int, _Load] = {}
        # When the last step ended.
        self._last: float | None = None
        # Whether the step under way may have guesses, and is part of a comparison.
        self._mode, self._looking = True, False

    def renew(self) -> None:
        """The plan has changed: what is known of steps with guesses is out of date.

        A load that has given up speculation keeps to that until it has looked again,
        soon: plans change more often than answers do.
        """
        for load in self._loads.values():
            left = load.left
            load.start_over()
            load.usual, load.lately[:] = None, (0, 0, 0)
            load.wait = _FIRST_WAIT
            load.left = min(left, _FIRST_WAIT)

    @property
    def timings(self) -> list[StepTiming]:
        """The last looks at each load."""
        return [
            StepTiming(
                load.running,
                guessing.row_steps,
                plain.seconds,
                guessing.seconds,
                guessing.bare_s,
                load.context,
            )
            for load in self._loads.values()
            for guessing, plain in zip(load.times[True], load.times[False], strict=True)
        ]

    def next_step(
        self,
        running: int,
        tokens: int,
        rows: int,
        prompt_rows: int = 0,
        new: int = 0,
        context: int = 1,
    ) -> bool:
        """Count a step; True if the next one may have guesses.

        Args:
            running: requests in it.
            tokens: that it emitted.
            rows: of all requests, one for each that reads its prompt.
            prompt_rows: that it read beside those. Steps that mostly read prompts are
                not compared.
            new: requests whose first step it is. Where all are new, there may have been
                nothing to do before.
            context: tokens of each request in the mean.
        """
        now = self._clock()
        before, self._last = self._last, now
        load = self._load((running - 1).bit_length())
        compared = new < running and prompt_rows <= _PROMPT_ROWS * running
        if compared and before is not None:
            load.left -= 1
            fallen = False
            if self._mode == load.guessing:
                load.running, load.context = running, context
                seconds, each = now - before, rows / running
                load.count(TimedStep(seconds, tokens, each, prompt_rows, running))
                # A request that begins has one token and says nothing of guesses.
                if load.speculating and load.look is None and not prompt_rows:
                    fallen = load.falls(running, tokens)
            if fallen:
                load.start_over()
                # Doubled if guessing still pays.
                load.wait = _FIRST_WAIT // 2
            elif load.left <= 0:
                load.go_on()
        self._mode, self._looking = load.guessing, load.look is not None
        return self._mode

    @property
    def looking(self) -> bool:
        """Whether the step under way is part of a comparison."""
        return self._looking

    def guesses(self, running: int) -> bool:
        """Whether steps of so many requests may have guesses, as far as is decided."""
        load = self._loads.get((running - 1).bit_length())
        return load is None or load.guessing

    def _load(self, key: int) -> _Load:
        """The range of loads, new if need be.

        What does not pay with fewer requests will not with more, so a new range begins
        as the next lower one is, and looks for itself soon.
        """
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load()
            lower = [other for other in self._loads if other < key]
            if lower and not self._loads[max(lower)].speculating:
                load.speculating, load.left = False, load.wait
        return load
