"""How many draft rows a step has, by how many requests run: measured while serving.

Whether drafts pay depends on the machine, the load and the text, and predictions of all
three err. So the controller keeps one draft length per *load bucket*. In short *probes*
it compares it with others, the most promising first. What counts is

    speed = mean acceptance length / seconds of a step.

The acceptance length of a draft length is averaged over many steps, because tokens per
step are very noisy. Step times are split into a level, which follows the machine's
own drift and is known from the draft length in force, and a ratio of each draft length
to it, which hardly changes and becomes more exact with each probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, pvariance
from typing import Any

# Steps of a probe.
PROBE = 10
# Standard errors that make an answer clear.
CLEAR = 2.0
# Relative variance of a step's time, at least, and of a ratio never measured.
NOISE, UNKNOWN = 0.05, 0.1
# A step of so many typical times waited for something else than its rows.
OUTLIER = 4.0
# Steps, or request-steps, after which an average counts half.
MEMORY = 4096
# Share of the time that probes of one draft length may cost in the long run.
BUDGET = 0.005
# Longest wait between probes, in steps.
LAST_WAIT = 250


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
        uniform: one bucket for all loads, which starts with the first of `prior`.
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
        uniform: bool = False,
        adapts: bool = True,
    ):
        ends = [max_num_running] if uniform else load_buckets(max_num_running)
        self.schedule = [0] * (max_num_running + 1)
        self._adapts = adapts
        self._changes: list[str] = []
        self._buckets: list[_Bucket] = []
        # By number of running requests; index 0 is not used.
        self._bucket_of: list[_Bucket] = []
        # Draft length of the last step, whatever its load.
        self._last_length = -1
        lengths = (0, *draft_lengths)
        for index, end in enumerate(ends):
            first = self._buckets[-1].end + 1 if self._buckets else 1
            start = 0 if prior is None else prior[index]
            bucket = _Bucket(lengths, first, end, lengths.index(start))
            self._buckets.append(bucket)
            self._bucket_of += [bucket] * (end - len(self._bucket_of) + 1)
            self._write(bucket)

    def observe(
        self, num_running: int, draft_length: int, num_tokens: int, seconds: float
    ) -> None:
        """Note one step that read no prompt.

        Args:
            num_running: requests of the step.
            draft_length: for which its drafts were made.
            num_tokens: that all its requests emitted.
            seconds: from the end of the step before to its own.
        """
        # The first step of a draft length has no prompt rows to draft from.
        settled = draft_length == self._last_length
        self._last_length = draft_length
        if not self._adapts or seconds <= 0:
            return
        bucket = self._bucket_of[num_running]
        length, current = bucket.length, bucket.current
        bucket.count(draft_length, num_running, num_tokens, seconds, settled)
        if bucket.length != length:
            self._write(bucket)
        if bucket.current != current:
            self._changes.append(bucket.describe(current))

    def take_changes(self) -> list[str]:
        """What has changed since the last call, a line for each."""
        if not self._changes:
            return self._changes
        changes, self._changes = self._changes, []
        return changes

    def hold(self, draft_length: int) -> None:
        """Decode every load with this draft length from now on; for measurements."""
        self._adapts = False
        self.schedule[1:] = [draft_length] * (len(self.schedule) - 1)

    def snapshot(self) -> list[dict[str, Any]]:
        """The buckets in which steps were observed, as JSON values."""
        return [bucket.to_dict() for bucket in self._buckets if bucket.steps]

    def _write(self, bucket: _Bucket) -> None:
        for num_running in range(bucket.first, bucket.end + 1):
            self.schedule[num_running] = bucket.length


class _Arm:
    """What is known of one draft length at one load.

    Attributes:
        accepted, requests: draft tokens accepted, and request-steps; fading.
        late_accepted, late_requests: the part of them that was not yet compared with
            what came before.
        ratio: its step time over the level.
        variance: of the ratio, relative; 0 for the arm in force.
        is_known: it was measured.
        not_before: step from which on it may be probed again.
    """

    def __init__(self, length: int):
        self.length = length
        self.accepted = self.requests = 0.0
        self.late_accepted = self.late_requests = 0.0
        self.ratio, self.variance = 1.0, UNKNOWN
        self.is_known = False
        self.not_before = 0.0
        self._aged_at = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens per request and step."""
        if not self.length:
            return 1.0
        return 1.0 + self.accepted / max(self.requests, 1.0)

    @property
    def speed(self) -> float:
        """Tokens per request and time, in units of the level."""
        return self.acceptance_length / self.ratio

    @property
    def speed_variance(self) -> float:
        """Relative variance of the speed.

        The number of tokens is taken for geometric, with three times the variance,
        because the steps of one text are alike.
        """
        if not self.length:
            return self.variance
        length, requests = self.acceptance_length, max(self.requests, 1.0)
        accepted = 3 * (length * (length - 1) + 1 / requests) / requests
        return self.variance + min(accepted / length**2, 2 * UNKNOWN)

    def add(self, requests: int, tokens: int) -> None:
        """Count a step."""
        self.requests += requests
        self.accepted += tokens - requests
        self.late_requests += requests
        self.late_accepted += tokens - requests

    def age(self, step: int) -> None:
        """Trust less what was seen at an earlier step."""
        kept = 0.5 ** ((step - self._aged_at) / MEMORY)
        self.scale(kept, kept)
        self.variance += 2 * (1 - kept) * NOISE / PROBE
        self._aged_at = step

    def scale(self, requests: float, accepted: float) -> None:
        self.requests *= requests
        self.accepted *= accepted

    def resemble(self, other: _Arm) -> None:
        """Expect of an arm that was never measured what its neighbour showed."""
        self.ratio, self.variance = other.ratio, UNKNOWN + other.variance
        self.requests, self.accepted = 1.0, other.acceptance_length - 1

    def learn_ratio(self, ratio: float, variance: float) -> None:
        """Take in a measured ratio of so much relative variance."""
        kept = variance / (self.variance + variance)
        self.ratio *= (ratio / self.ratio) ** (1 - kept)
        self.variance *= kept


class _Bucket:
    """One load bucket: what is in force, what is known, and the probe under way.

    An *arm* is a draft length; arm 0 is plain decoding.
    """

    def __init__(self, lengths: tuple[int, ...], first: int, end: int, current: int):
        self.first, self.end, self.current = first, end, current
        self.steps = 0
        self._arms = [_Arm(length) for length in lengths]
        self._arm_of = {arm.length: arm for arm in self._arms}
        self._arms[current].is_known, self._arms[current].variance = True, 0.0
        # Seconds of a step with ratio 1, and the number of steps it is known from.
        self._level, self._level_steps = 0.0, 0
        # The arm that is probed; None between probes.
        self._rival: int | None = None
        # Steps until the probe begins or ends; the first begins at once.
        self._left = 3
        # What the probe has cost, in steps of the arm in force, and its step times.
        self._lost = 0.0
        self._block: list[float] = []
        # Step at which the answer or the traffic last changed.
        self._changed_at = 0

    @property
    def length(self) -> int:
        """The draft length to schedule now."""
        return self._arms[self.current if self._rival is None else self._rival].length

    def to_dict(self) -> dict[str, Any]:
        arm = self._arms[self.current]
        return {
            "max_num_running": self.end,
            "draft_length": arm.length,
            "acceptance_length": round(arm.acceptance_length, 3),
            "observed_steps": self.steps,
        }

    def describe(self, before: int) -> str:
        arm = self._arms[self.current]
        requests = f"{self.end} request{'s' * (self.end > 1)}"
        return (
            f"draft length {self._arms[before].length} -> {arm.length} for up to "
            f"{requests} (acceptance length {arm.acceptance_length:.2f})"
        )

    def count(
        self, length: int, requests: int, tokens: int, seconds: float, settled: bool
    ) -> None:
        """Note a step; settled: the step before had the same draft length."""
        self.steps += 1
        self._left -= 1
        arm = self._arm_of[length]
        if settled:
            arm.add(requests, tokens)
        if self._rival is None:
            if settled and length == self.length:
                self._follow_level(seconds / arm.ratio)
            if self.steps % 32 == 0 and self._notice_change(arm):
                self._left = 0
            if self._left <= 0:
                self._begin_probe()
        elif length == self.length:
            own = self._arms[self.current]
            self._block.append(seconds)
            self._lost += seconds / (self._level * own.ratio)
            self._lost -= tokens / requests / own.acceptance_length
            if self._left <= 0 or self._lost >= PROBE:
                self._end_probe(self._rival)

    def _follow_level(self, seconds: float) -> None:
        """Let the level follow a step with the arm in force."""
        self._level_steps = min(self._level_steps + 1, 2 * PROBE)
        level = self._level or seconds
        self._level = (
            level + (min(seconds, OUTLIER * level) - level) / self._level_steps
        )

    def _begin_probe(self) -> None:
        """Probe the arm that may be fastest; plain decoding comes first."""
        self._notice_change(self._arms[self.current])
        for arm in self._arms:
            arm.age(self.steps)
        self._arms[self.current].variance = 0.0
        self._left = self._wait()
        if not self._level:
            return
        known = [index for index, arm in enumerate(self._arms) if arm.is_known]
        best_score = 0.0
        for index, arm in enumerate(self._arms):
            if index == self.current or arm.not_before > self.steps:
                continue
            near = min(known, key=lambda other: abs(other - index))
            if not arm.is_known:
                arm.resemble(self._arms[near])
            gain, error = self._gain(arm)
            # Of arms that were never measured, those near to what is known come first.
            score = gain + CLEAR * error - 0.001 * abs(index - near)
            if index == 0:
                score += 1.0
            if score > best_score:
                self._rival, best_score = index, score
        if self._rival is not None:
            self._arms[self._rival].is_known = True
            self._left, self._lost, self._block = PROBE, 0.0, []

    def _end_probe(self, rival: int) -> None:
        """Decide between the arm in force and its rival."""
        arm = self._arms[rival]
        limit = OUTLIER * median(self._block)
        block = [seconds for seconds in self._block if seconds <= limit]
        mean = fmean(block)
        noise = max(NOISE, pvariance(block) / mean**2)
        noise *= 1 / len(block) + 1 / self._level_steps
        arm.learn_ratio(mean / self._level, noise)
        self._rival = None
        self._notice_change(arm)
        gain, error = self._gain(arm)
        # In the long run small gains count too, and an error is soon undone.
        is_early = self.steps < self._changed_at + 4 * LAST_WAIT
        if gain > (CLEAR if is_early else CLEAR / 2) * error:
            self.current, self._changed_at = rival, self.steps
            # From now on the level is measured with this arm.
            for other in self._arms:
                other.variance += arm.variance
            arm.variance = 0.0
        # A rival that seems to be faster is probed again at once.
        self._left = PROBE if gain > error / 2 else self._wait()
        arm.not_before = self.steps + self._lost / BUDGET

    def _wait(self) -> int:
        """Steps until the next probe: more while nothing changes."""
        return min(max((self.steps - self._changed_at) // 16, PROBE), LAST_WAIT)

    def _gain(self, arm: _Arm) -> tuple[float, float]:
        """Log of an arm's speed over that of the arm in force; standard error."""
        own = self._arms[self.current]
        error = math.sqrt(arm.speed_variance + own.speed_variance)
        return math.log(arm.speed / own.speed), error

    def _notice_change(self, arm: _Arm) -> bool:
        """Compare an arm's late steps with those before: has the traffic changed?"""
        accepted, requests = arm.late_accepted, arm.late_requests
        before = arm.requests - requests
        if not arm.length or requests < 32:
            return False
        if requests > MEMORY / 8 or before < 32:
            arm.late_accepted = arm.late_requests = 0.0
        if before < 32:
            return False
        old, new = max(arm.accepted - accepted, 0.0) / before, accepted / requests
        variance = 4 * (old * (1 + old) + 1 / requests)
        error = math.sqrt(variance / requests + variance / before)
        if arm.requests > MEMORY:
            arm.scale(0.5, 0.5)
        if abs(new - old) < max(3 * error, 0.1 * (1 + old)):
            return False
        # What one arm accepts changes for all, roughly in proportion.
        change = max(new, 0.02) / max(old, 0.02)
        for other in self._arms:
            kept = min(1.0, 16 / max(other.requests, 1.0))
            other.scale(kept, kept * change)
            other.late_accepted = other.late_requests = 0.0
            other.not_before = 0.0
        arm.requests, arm.accepted = requests, accepted
        self._changed_at = self.steps
        return True
