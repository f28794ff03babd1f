"""Whether speculation really pays at this load: measured, not predicted.

Plans come from a profile and from chances, and both can be off, most of all where many
requests share a step. So a serving engine compares: it speculates, now and then
decodes plainly for a few dozen steps, and stays with what brought more tokens per
second. A wrong plan then costs the probes, a few per cent for a while, then less.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple

from vllm_ppd.prompt_cost import seconds_per_row
from vllm_ppd.step_timing import StepTiming

__all__ = ["LoadGuard"]

# Steps that a comparison looks at, with guesses and without. Tokens per step vary more
# with guesses, so that side looks longer.
_GUESSING, _PLAIN = 64, 32
# Steps after a switch that are not counted: guesses have to be built up first.
_SETTLING = 2
# Steps between comparisons: as many again each time that the answer stays the same, and
# so many that looking at the slower way costs about this share of the time.
_FIRST_WAIT, _LONGEST_WAIT = 256, 8192
_BUDGET = 0.01
# How much faster guessing has to look to go on, and to begin again: noise should not
# decide, and at equal speed plain decoding is the simpler way.
_STAY, _RETURN = 1.03, 1.05
# Guesses that are tried again are given up after so many steps, or twice as many, if
# they have been that much slower than plain decoding.
_FIRST_LOOK, _HOPELESS = 16, 0.9
# Where guesses bring so much fewer tokens per step than usual the traffic has changed
# and what was known of speeds is out of date. Looked at after so many steps that have
# so many requests together, for a single text is now easy, now hard to guess.
_FALLEN, _LOOK_STEPS, _LOOK_REQUESTS = 0.8, 32, 256
# A step that also reads so many prompt rows per running request, or fewer, is compared
# all the same, without what those cost: on a full server that is most steps.
_PROMPT_ROWS = 8
# Looks at a way to decode whose times are remembered.
_LOOKS = 9
# A step now and then waits for something else and takes more than so many medians.
# Plain steps are all alike; of others some may have guesses, and those take longer.
_OUTLIER = {True: 4.0, False: 2.0}


class _Step(NamedTuple):
    seconds: float
    tokens: int
    rows: float
    """Per request."""
    prompt_rows: int


@dataclass
class _Load:
    """One range of running requests."""

    speculating: bool = True
    probing: bool = False
    # Steps until the next change of phase, counted down.
    left: int = _GUESSING + _SETTLING
    settling: int = _SETTLING
    wait: int = _FIRST_WAIT
    # The phase's last ones.
    steps: deque[_Step] = field(default_factory=lambda: deque(maxlen=_GUESSING))
    # Tokens per second with guesses and without, as last seen.
    speeds: dict[bool, float] = field(default_factory=dict)
    # With guesses over without, of the last two comparisons.
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    # Seconds per step and rows per request of the last looks, which say something of
    # the machine.
    times: dict[bool, deque[tuple[float, float]]] = field(default_factory=dict)
    running: int = 1
    # Seconds that a prompt's row adds to a step; None until that was seen.
    prompt_row_s: float | None = None
    # Tokens per request and step with guesses, usually; and steps, requests and tokens
    # since that was last looked at.
    usual: float | None = None
    lately: list[int] = field(default_factory=lambda: [0, 0, 0])

    @property
    def guessing(self) -> bool:
        """Whether steps may have guesses in this phase."""
        return self.speculating != self.probing

    def start_over(self) -> None:
        """Forget all speeds, and look at both ways to decode again, soon.

        The last steps are forgotten too: the change was somewhere among them.
        """
        self.speeds.clear()
        self.ratios.clear()
        self.steps.clear()
        self.settling, self.left = _SETTLING, _SETTLING + _GUESSING
        # Which is doubled if guessing still pays.
        self.wait = _FIRST_WAIT // 2

    @property
    def hopeless(self) -> bool:
        """Whether guesses are on trial and already known to fail."""
        if self.speculating or not self.probing or self.settling:
            return False
        if len(self.steps) not in (_FIRST_LOOK, 2 * _FIRST_LOOK):
            return False
        plain = self.speeds.get(False)
        return plain is not None and _speed(self.counted, True) < _HOPELESS * plain

    @property
    def counted(self) -> list[_Step]:
        """The phase's steps, as long as they would have taken without prompts."""
        cost = self.prompt_row_s or 0.0
        return [
            step._replace(seconds=max(0.0, step.seconds - cost * step.prompt_rows))
            for step in self.steps
        ]

    def learn_prompt_cost(self, guessing: bool) -> None:
        """From the phase's steps, which are alike but for the prompts in them.

        Plain ones, where there are any: what prompts cost more beside guesses is what
        guesses cost.
        """
        if guessing and self.prompt_row_s is not None:
            return
        seen = seconds_per_row(
            [step.prompt_rows for step in self.steps],
            [step.seconds for step in self.steps],
        )
        if seen is not None:
            known = self.prompt_row_s
            self.prompt_row_s = seen if known is None else (known + seen) / 2

    def time(self, mode: bool) -> tuple[float, float]:
        """Seconds per step and rows per request in the median over looks."""
        seconds, rows = zip(*self.times[mode], strict=True)
        return median(seconds), median(rows)

    @property
    def affordable_wait(self) -> int:
        """Steps before the next look at the other way, for what that will cost."""
        kept, other = self.speculating, not self.speculating
        worth = self.speeds[other] / self.speeds[kept]
        looked_at = _PLAIN
        if not kept:
            looked_at = _FIRST_LOOK if worth < _HOPELESS else _GUESSING
        lost = (_SETTLING + looked_at) * self.times[other][-1][0] * (1 - worth)
        return int(lost / (_BUDGET * self.times[kept][-1][0]))

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
        # Whether the step under way may have guesses.
        self._mode = True

    def renew(self) -> None:
        """The plan has changed: what is known of steps with guesses is out of date.

        A load that has given up speculation keeps to that until it has looked again,
        soon: plans change more often than answers do.
        """
        for load in self._loads.values():
            load.speeds.pop(True, None)
            load.ratios.clear()
            load.usual, load.lately[:] = None, (0, 0, 0)
            load.wait = _FIRST_WAIT
            load.left = min(load.left, _FIRST_WAIT)
            if load.guessing:
                load.steps.clear()
                load.settling = _SETTLING

    @property
    def timings(self) -> list[StepTiming]:
        """Steps of the loads at which both ways to decode have been seen."""
        found = []
        for load in self._loads.values():
            if len(load.times) == 2:
                (guessing_s, rows), (plain_s, _) = load.time(True), load.time(False)
                looks = min(map(len, load.times.values()))
                found.append(StepTiming(load.running, rows, plain_s, guessing_s, looks))
        return found

    def next_step(
        self, running: int, tokens: int, rows: int, prompt_rows: int = 0, new: int = 0
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
        """
        now = self._clock()
        before, self._last = self._last, now
        load = self._load((running - 1).bit_length())
        compared = new < running and prompt_rows <= _PROMPT_ROWS * running
        if compared and before is not None:
            load.left -= 1
            fallen = False
            if self._mode == load.guessing:
                if load.settling:
                    load.settling -= 1
                else:
                    load.steps.append(
                        _Step(now - before, tokens, rows / running, prompt_rows)
                    )
                    load.running = running
                    # A request that begins has one token and says nothing of guesses.
                    if load.speculating and not load.probing and not prompt_rows:
                        fallen = load.falls(running, tokens)
            if fallen:
                load.start_over()
            elif load.left <= 0 or load.hopeless:
                self._change_phase(load)
        self._mode = load.guessing
        return self._mode

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

    def _change_phase(self, load: _Load) -> None:
        mode, looked = load.guessing, len(load.steps) >= _FIRST_LOOK
        if looked:
            load.learn_prompt_cost(mode)
            speed, steps = _speed(load.counted, mode), _undisturbed(load.counted, mode)
            load.speeds[mode] = speed
            # The mean time, not the median: where only some steps have guesses, those
            # are the long ones.
            seconds = fmean(step.seconds for step in steps)
            rows = fmean(step.rows for step in steps)
            load.times.setdefault(mode, deque(maxlen=_LOOKS)).append((seconds, rows))
        load.steps.clear()
        load.settling = _SETTLING
        if not load.probing:
            # Look at the other way to decode.
            load.probing = True
            load.left = _SETTLING + (_PLAIN if load.speculating else _GUESSING)
            return
        load.probing = False
        load.left = load.wait
        if looked and len(load.speeds) == 2:
            self._compare(load)

    def _compare(self, load: _Load) -> None:
        """Choose by both speeds, as last seen and as seen before that.

        The two were seen one after the other, at a machine that is now faster, now
        slower. So what would change the answer is looked at once more, soon: guessing
        begins again when it paid twice, and ends when it does not pay in the mean of
        two looks, or at the first.
        """
        load.ratios.append(load.speeds[True] / load.speeds[False])
        if load.speculating:
            differs = load.ratios[-1] < _STAY
            sure = fmean(load.ratios) < _STAY
        else:
            differs = load.ratios[-1] >= _RETURN
            sure = len(load.ratios) > 1 and min(load.ratios) >= _RETURN
        if differs and not sure:
            load.left = _SETTLING + (_GUESSING if load.speculating else _PLAIN)
            return
        wait = _FIRST_WAIT if differs else 2 * load.wait
        if differs:
            load.speculating = not load.speculating
            if not load.speculating:
                load.ratios.clear()
        load.wait = min(max(wait, load.affordable_wait), _LONGEST_WAIT)
        load.left = load.wait


def _undisturbed(steps: Iterable[_Step], guessing: bool) -> list[_Step]:
    """Without steps that waited for something else."""
    steps = list(steps)
    most = _OUTLIER[guessing] * median(step.seconds for step in steps)
    return [step for step in steps if step.seconds <= most]


def _speed(steps: Iterable[_Step], guessing: bool) -> float:
    """Tokens per second."""
    steps = _undisturbed(steps, guessing)
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)
