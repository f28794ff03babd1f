"""How many draft rows a step has, by how many requests run: measured while serving.

Whether drafts pay depends on the machine, the load and the text, and predictions of all
three err. So the controller keeps one draft length per *load bucket*. In short *probes*
it compares it with others, first those with the most expected gain for their expected
cost. What counts is

    speed = mean acceptance length / seconds of a step.

The acceptance length depends on the text alone. It is averaged over many steps of all
loads, because tokens per step are very noisy. Step times are split into a level, which
follows the machine's own drift and is known from the draft length in force, and a ratio
of each draft length to it, which hardly changes and becomes more exact with each probe.

What probes may cost is limited, so that traffic for which no draft pays is
served as fast as without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, median, pvariance
from typing import Any

# Steps of a probe.
PROBE = 10
# Share of a load's steps that probes may cost in the long run. A probe that has cost
# half of its own steps ends.
BUDGET = 0.006
# Standard errors that make an answer clear.
CLEAR = 2.0
# Relative variance of a step's time, at least, and of a ratio never measured.
NOISE, UNKNOWN = 0.03, 0.1
# A step of so many typical times waited for something else than its rows.
OUTLIER = 4.0
# Request-steps that say something of a text.
FEW = 64
# Steps, or request-steps, after which an average counts half.
MEMORY = 4096


def load_buckets(max_num_running: int) -> list[int]:
    """Largest number of running requests of each load bucket: 1, 2, 4, 8, ..."""
    ends = [1 << bit for bit in range(max_num_running.bit_length())]
    return [end for end in ends if end < max_num_running] + [max_num_running]


class DraftLengthController:
    """Chooses the draft length of every load bucket.

    Args:
        draft_lengths: of the menu's entries, rising, without 0.
        max_num_running: most requests that run at once.
        prior: draft length that each bucket of `load_buckets` starts with; None for 0
            everywhere, which is plain decoding.
        acceptance: mean acceptance length that is expected of each draft length; None
            where it is not known.
        step_ratios: [bucket][draft length] step time over plain decoding's that is
            expected.
        plain_seconds: [max_num_running + 1] of a plain step, by running requests, that
            are expected; loads of one bucket are made comparable by them.
        uniform: one bucket for all loads, the first of `prior` and `step_ratios`.
        adapts: whether draft lengths may change.

    Attributes:
        schedule: [max_num_running + 1] draft length by running requests, changed in
            place.
    """

    def __init__(
        self,
        draft_lengths: Sequence[int],
        max_num_running: int,
        prior: Sequence[int] | None = None,
        acceptance: Sequence[float | None] = (),
        step_ratios: Sequence[Sequence[float]] | None = None,
        plain_seconds: Sequence[float] | None = None,
        uniform: bool = False,
        adapts: bool = True,
    ):
        ends = [max_num_running] if uniform else load_buckets(max_num_running)
        lengths = (0, *draft_lengths)
        expected = [1.0, *(acceptance or [None] * len(draft_lengths))]
        self._arms = [_Arm(*arm) for arm in zip(lengths, expected, strict=True)]
        self._index = {length: index for index, length in enumerate(lengths)}
        self.schedule = [0] * (max_num_running + 1)
        self._adapts = adapts
        self._changes: list[str] = []
        # By number of running requests; index 0 is not used.
        self._bucket_of: list[_Bucket] = []
        for index, end in enumerate(ends):
            first = ends[index - 1] + 1 if index else 1
            start = lengths.index(prior[index]) if prior else 0
            ratios = step_ratios[index] if step_ratios else [1.0] * len(draft_lengths)
            bucket = _Bucket(self._arms, [1.0, *ratios], first, end, start)
            self._bucket_of += [bucket] * (end + 1 - len(self._bucket_of))
            self._write(bucket)
        plain = plain_seconds or [1.0] * (max_num_running + 1)
        # Times as many as the bucket's most requests would take.
        self._scales = [
            plain[b.end] / seconds
            for b, seconds in zip(self._bucket_of, plain, strict=True)
        ]
        # Draft length of the last step, whatever its load.
        self._last_length = -1

    def observe(
        self,
        num_running: int,
        draft_length: int,
        num_tokens: int,
        seconds: float,
        num_reading: int = 0,
        prompt_rows: int = 0,
    ) -> None:
        """Note one step.

        Args:
            num_running: requests of the step.
            draft_length: for which its drafts were made.
            num_tokens: that the requests emitted which read no prompt.
            seconds: from the end of the step before to its own.
            num_reading: requests that read prompts in this step.
            prompt_rows: rows of those requests.
        """
        # The first step of a draft length has no prompt rows to draft from.
        settled = draft_length == self._last_length
        self._last_length = draft_length
        num_decoding = num_running - num_reading
        if not self._adapts or seconds <= 0 or not num_decoding:
            return
        bucket, index = self._bucket_of[num_running], self._index[draft_length]
        scheduled, in_force = bucket.scheduled, bucket.in_force
        bucket.steps += 1
        bucket.debt = max(bucket.debt - BUDGET, 0.0)
        if settled:
            self._count(index, num_decoding, num_tokens)
        seconds *= self._scales[num_running]
        if prompt_rows:
            seconds = bucket.without_prompts(index, prompt_rows, seconds)
        if bucket.rival is None:
            if settled and index == in_force and not prompt_rows:
                bucket.follow_level(seconds)
            if bucket.quiet_steps >= PROBE and not bucket.debt:
                bucket.begin_probe()
        elif index == bucket.rival:
            bucket.count_probe(seconds, num_tokens / num_decoding)
        if bucket.scheduled != scheduled:
            self._write(bucket)
        if bucket.in_force != in_force:
            self._changes.append(bucket.describe(in_force))

    def take_changes(self) -> list[str]:
        """What has changed since the last call, a line for each."""
        if not self._changes:  # as in nearly every step
            return self._changes
        changes, self._changes = self._changes, []
        return changes

    def hold(self, draft_length: int) -> None:
        """Decode every load with this draft length from now on; for measurements."""
        self._adapts = False
        self.schedule[1:] = [draft_length] * (len(self.schedule) - 1)

    def snapshot(self) -> list[dict[str, Any]]:
        """The buckets in which steps were observed, as JSON values."""
        buckets = dict.fromkeys(self._bucket_of)
        return [bucket.to_dict() for bucket in buckets if bucket.steps]

    def _count(self, index: int, requests: int, tokens: int) -> None:
        """Count a step; if the text has changed, it has for all draft lengths."""
        if self._arms[index].count(requests, tokens):
            for other in self._arms[:index] + self._arms[index + 1 :]:
                other.expect(other.accepted, 1)
            for bucket in self._bucket_of:
                bucket.debt = 0.0

    def _write(self, bucket: _Bucket) -> None:
        length = self._arms[bucket.scheduled].draft_length
        for num_running in range(bucket.first, bucket.end + 1):
            self.schedule[num_running] = length


class _Arm:
    """What the text accepts of one draft length, whatever the load.

    Attributes:
        draft_length: 0 for plain decoding.
        expected: draft tokens accepted per request and step, before any was seen.
    """

    def __init__(self, draft_length: int, acceptance_length: float | None):
        self.draft_length = draft_length
        known = acceptance_length or 1.5
        self.expected = max(known - 1, 1 / FEW) if draft_length else 0.0
        # Request-steps and what they accepted: those of long ago, which fade, and the
        # latest, which are compared with them whenever they have doubled.
        self._requests, self._total = 1.0, self.expected
        self._late_requests = self._late_total = 0.0
        self._compare_at = FEW

    @property
    def requests(self) -> float:
        return self._requests + self._late_requests

    @property
    def accepted(self) -> float:
        return (self._total + self._late_total) / self.requests

    @property
    def variance(self) -> float:
        """Relative variance of the acceptance length."""
        variance = _variance(self.accepted, self.requests) / (1 + self.accepted) ** 2
        return min(variance, 2 * UNKNOWN) if self.draft_length else 0.0

    def fade(self, kept: float) -> None:
        """Trust less what was seen long ago."""
        kept = max(kept, 1 / self._requests)
        self._requests *= kept
        self._total *= kept

    def expect(self, accepted: float, requests: float) -> None:
        """Take this for what is accepted, as if seen in at most so many requests."""
        self._requests = min(self.requests, requests)
        self._total = accepted * self._requests
        self._late_requests = self._late_total = 0.0
        self._compare_at = FEW

    def count(self, requests: int, tokens: int) -> bool:
        """Count a step; says whether the latest ones differ from those before."""
        self._late_requests += requests
        self._late_total += tokens - requests
        late = self._late_requests
        if late < self._compare_at:
            return False
        self._compare_at *= 2
        new, old = self._late_total / late, self._total / self._requests
        error = math.sqrt(_variance(old, late) + _variance(old, self._requests))
        if abs(new - old) > max(2 * CLEAR * error, 0.1 * (1 + old)):
            self.expect(new, late)
            return True
        if late >= MEMORY / 8:
            self.expect(self.accepted, MEMORY)
        return False


def _variance(accepted: float, requests: float) -> float:
    """Variance of a mean over so many request-steps, which accept so many draft tokens.

    That of geometric numbers, times three because the steps of one text are alike.
    """
    return 3 * (accepted * (1 + accepted) + 1 / requests) / requests


def _promise(gain: float, error: float) -> float:
    """A probe's expected gain divided by its expected cost; 0 if it clearly has none.

    Args:
        gain: log of the rival's speed over that in force, as now known.
        error: its standard error. The expected gain is the mean of the positive part
            of a normal distribution.
    """
    if gain + CLEAR * error <= 0:
        return 0.0
    normal = NormalDist(gain, error)
    improvement = gain * (1 - normal.cdf(0)) + error**2 * normal.pdf(0)
    return improvement / (NOISE + max(-gain, 0.0))


class _Bucket:
    """One load bucket: what is in force, what steps take, and the probe under way.

    Draft lengths go by their index; 0 is plain decoding.
    """

    def __init__(
        self,
        arms: list[_Arm],
        ratios: Sequence[float],
        first: int,
        end: int,
        in_force: int,
    ):
        self.first, self.end, self.in_force = first, end, in_force
        self.steps = 0
        self._arms = arms
        # Seconds of a step with ratio 1, and the number of steps it is known from.
        self._level, self._level_steps = 0.0, 0
        # Step times over the level: as expected, as measured, and relative variance,
        # which is 0 for the draft length in force.
        self._expected = [ratio / ratios[in_force] for ratio in ratios]
        self._ratios = list(self._expected)
        self._variances = [UNKNOWN] * len(ratios)
        self._variances[in_force] = 0.0
        self._measured = {in_force}
        # Step at which variances last grew, and that of the last probe of plain steps.
        self._aged_at = self._plain_at = 0
        # The draft length that is probed; None between probes.
        self.rival: int | None = None
        # Steps since the last probe; the first one begins soon.
        self.quiet_steps = PROBE - 3
        # What probes have cost in excess of their budget, in steps.
        self.debt = 0.0
        # Steps of the probe, the times of those that could be measured, and what they
        # cost in steps of the arm in force.
        self.probe_steps = 0
        self.times: list[float] = []
        self.lost = 0.0
        # Seconds that a prompt row adds to a step, and the steps it is known from.
        self._prompt_row, self._prompt_steps = 0.0, 0

    @property
    def scheduled(self) -> int:
        """The index of the draft length to schedule now."""
        return self.in_force if self.rival is None else self.rival

    def to_dict(self) -> dict[str, Any]:
        arm = self._arms[self.in_force]
        return {
            "max_num_running": self.end,
            "draft_length": arm.draft_length,
            "acceptance_length": round(1 + arm.accepted, 3),
            "observed_steps": self.steps,
        }

    def describe(self, before: int) -> str:
        arm = self._arms[self.in_force]
        requests = f"{self.end} request{'s' * (self.end > 1)}"
        return (
            f"draft length {self._arms[before].draft_length} -> {arm.draft_length} "
            f"for up to {requests} (acceptance length {1 + arm.accepted:.2f})"
        )

    def follow_level(self, seconds: float) -> None:
        """Let the level follow a step with the draft length in force."""
        self.quiet_steps += 1
        seconds /= self._ratios[self.in_force]
        self._level_steps = min(self._level_steps + 1, 2 * PROBE)
        level = self._level or seconds
        self._level = (
            level + (min(seconds, OUTLIER * level) - level) / self._level_steps
        )

    def without_prompts(self, index: int, rows: int, seconds: float) -> float:
        """Seconds of a step less what its prompt rows take; 0 if that is most of it or
        not known."""
        expected = self._level * self._ratios[index]
        if seconds > 2 * expected:
            return 0.0
        if index == self.in_force:
            self._prompt_steps = min(self._prompt_steps + 1, 2 * PROBE)
            error = (seconds - expected) / rows - self._prompt_row
            self._prompt_row += error / self._prompt_steps
        known = self._prompt_steps >= PROBE
        return max(seconds - rows * self._prompt_row, 0.0) if known else 0.0

    def begin_probe(self) -> None:
        """Probe what promises most for its cost, or nothing."""
        self._age()
        self.quiet_steps = 0
        scores = [0.0] * len(self._arms)
        for index in range(len(self._arms)):
            if index != self.in_force:
                self._expect(index)
                scores[index] = _promise(*self._gain(index))
        best = max(range(len(scores)), key=scores.__getitem__)
        # Drafts must never be slower than plain decoding: it is probed first, then
        # often where it may be faster, and seldom where it was clearly slower.
        is_due = self.steps > self._plain_at + MEMORY / (16 if scores[0] else 4)
        if self.in_force and (is_due or 0 not in self._measured):
            best, self._plain_at = 0, self.steps
        elif not scores[best]:
            return
        self.rival = best
        self._measured.add(best)
        self.probe_steps, self.times, self.lost = 0, [], 0.0

    def count_probe(self, seconds: float, tokens: float) -> None:
        """Note a step of the probe, its time if known, and its tokens per request."""
        self.probe_steps += 1
        if seconds:
            self.times.append(seconds)
            self.lost += seconds / (self._level * self._ratios[self.in_force])
            self.lost -= tokens / (1 + self._arms[self.in_force].accepted)
        if len(self.times) == PROBE or self.lost >= PROBE / 2:
            self._end_probe()
        elif self.probe_steps == 4 * PROBE:
            # Too many steps read prompts.
            self.rival, self.debt = None, 1.0

    def _end_probe(self) -> None:
        """Decide between the draft length in force and its rival."""
        rival, self.rival = self.scheduled, None
        limit = OUTLIER * median(self.times)
        block = [seconds for seconds in self.times if seconds <= limit]
        mean = fmean(block)
        noise = max(NOISE, pvariance(block) / mean**2)
        noise *= 1 / len(block) + 1 / self._level_steps
        kept = noise / (self._variances[rival] + noise)
        self._ratios[rival] *= (mean / self._level / self._ratios[rival]) ** (1 - kept)
        self._variances[rival] *= kept
        gain, error = self._gain(rival)
        # Less than clear is enough, since an error is soon undone.
        if gain > 0.625 * CLEAR * error:
            self.in_force = rival
            # Perhaps the text is another: what was seen in few steps counts little.
            for arm in self._arms:
                if arm.requests < MEMORY / 8:
                    arm.expect(arm.accepted, 1)
            # From now on the level is measured with this one.
            own = self._variances[rival]
            self._variances = [variance + own for variance in self._variances]
            self._variances[rival] = 0.0
        # A rival that seems to be faster is soon probed again.
        self.debt = 0.0 if gain > 0 else max(self.lost, 1.0)

    def _age(self) -> None:
        """Trust less what was measured at earlier steps."""
        kept = 0.5 ** ((self.steps - self._aged_at) / MEMORY)
        self._aged_at = self.steps
        aged = 2 * (1 - kept) * NOISE / PROBE
        self._variances = [variance + aged for variance in self._variances]
        self._variances[self.in_force] = 0.0
        for arm in self._arms:
            arm.fade(kept)

    def _expect(self, index: int) -> None:
        """Correct what was expected by what the nearest measured one showed."""
        if index not in self._measured:
            near = min(self._measured, key=lambda other: abs(other - index))
            correction = self._ratios[near] / self._expected[near]
            self._ratios[index] = self._expected[index] * correction
            self._variances[index] = UNKNOWN + self._variances[near]
        seen = [i for i, arm in enumerate(self._arms) if i and arm.requests >= FEW]
        if index and self._arms[index].requests <= 1 and seen:
            near = min(seen, key=lambda other: abs(other - index))
            correction = self._arms[near].accepted / self._arms[near].expected
            self._arms[index].expect(self._arms[index].expected * correction, 1)

    def _gain(self, index: int) -> tuple[float, float]:
        """Log of a draft length's speed over that in force; standard error."""
        speeds, variance = [], 0.0
        for i in (index, self.in_force):
            speeds.append((1 + self._arms[i].accepted) / self._ratios[i])
            variance += self._arms[i].variance + self._variances[i]
        return math.log(speeds[0] / speeds[1]), math.sqrt(variance)
