"""How many draft rows a step has, by how many requests run: measured while serving.

Whether drafts pay depends on the machine, the load and the text, and predictions of all
three err. So the controller keeps one draft length per *load bucket*. In short *probes*
it compares it with others: its neighbours in the menu, plain decoding, and far ones.
A probe alternates blocks of steps with both draft lengths. What counts is

    speed = mean acceptance length / seconds per request and step.

The acceptance length of a draft length is taken from all its steps, because tokens per
step are very noisy. The ratio of step times is taken from the probe's pairs of blocks,
because a machine's own speed drifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median, variance
from typing import Any

__all__ = ["DraftLengthController", "load_buckets"]

# Steps of a block that count. The step before them has no prompt rows to draft from.
BLOCK = 8
# A probe ends when its answer is clear, or after so many pairs of blocks.
MAX_PAIRS = 12
# A step of so many medians waited for something else than its rows.
OUTLIER = 4.0
# Standard errors that make an answer clear.
CLEAR = 2.0
# What a draft length must gain over the one in force, where the answer is not clear.
LEAST_GAIN = 0.03
# Steps between probes: doubled while nothing changes, between these limits.
FIRST_WAIT, LAST_WAIT = 16, 1500
# Share of the time that probes of one slower draft length may cost in the long run.
BUDGET = 0.005
# Request-steps of an average that follows the traffic; if it leaves the long average of
# the draft length in force by a fifth, the traffic has changed.
RECENT, CHANGED = 512, 0.2


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
        bucket = self._bucket_of[num_running]
        if not self._adapts or draft_length != bucket.length or seconds <= 0:
            return
        before = bucket.current
        if bucket.count(num_running, num_tokens, seconds):
            self._write(bucket)
        if bucket.current != before:
            self._changes.append(bucket.describe(before))

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


class _Bucket:
    """One load bucket: what is in force, what is known, and the probe under way.

    An *arm* is an index into the draft lengths; arm 0 is plain decoding.
    """

    def __init__(self, lengths: tuple[int, ...], first: int, end: int, current: int):
        self._lengths, self.first, self.end = lengths, first, end
        self.current = current
        # Steps so far, and those until the arm in force last changed.
        self.steps = self._changed_at = 0
        # Tokens and request-steps of each arm; a plain step emits one per request.
        self._tokens = [0.0] * len(lengths)
        self._requests = [0.0] * len(lengths)
        # The same of the arm in force, of late.
        self._recent_tokens = self._recent_requests = 0.0
        # Step from which on each arm may be probed again.
        self._not_before = [0.0] * len(lengths)
        self._rivals = self._rivals_in_turn()
        self._wait = self._left = FIRST_WAIT
        self._start(current)
        # The rival of the probe under way; None between probes.
        self._rival: int | None = None
        # Seconds per request of each counted step of the block.
        self._block: list[float] = []
        # Of the arm in force in the pair's first block, and log ratios of all pairs.
        self._own_speed = 1.0
        self._ratios: list[float] = []
        # Seconds that the probe has cost.
        self._lost = 0.0

    @property
    def length(self) -> int:
        """The draft length to schedule now."""
        return self._lengths[self._arm]

    def to_dict(self) -> dict[str, Any]:
        return {
            "max_num_running": self.end,
            "draft_length": self._lengths[self.current],
            "acceptance_length": round(self._acceptance_length(self.current), 3),
            "observed_steps": self.steps,
        }

    def describe(self, before: int) -> str:
        requests = f"{self.end} request{'s' * (self.end > 1)}"
        old, new = self._lengths[before], self._lengths[self.current]
        return (
            f"draft length {old} -> {new} for up to {requests} (acceptance length "
            f"{self._acceptance_length(self.current):.2f})"
        )

    def count(self, num_running: int, num_tokens: int, seconds: float) -> bool:
        """Note a step with `length`; True if another length is now to be scheduled."""
        self.steps += 1
        if self._unsettled:
            self._unsettled -= 1
            return False
        self._tokens[self._arm] += num_tokens
        self._requests[self._arm] += num_running
        if self._rival is None:
            self._left -= 1
            self._follow(num_running, num_tokens)
            if self._left <= 0:
                self._begin_probe()
            return False
        self._block.append(seconds / num_running)
        if self._arm != self.current:
            # In seconds, what is lost against steps with the arm in force.
            own = self._own_speed * self._acceptance_length(self.current)
            self._lost += seconds - num_tokens / own
            if self._is_hopeless(own):
                self._ratios.append(math.log(self._block_speed() / self._own_speed))
                self._end_probe(wins=False)
                return True
        return len(self._block) == BLOCK and self._end_block()

    def _begin_probe(self) -> None:
        """The first block of a pair is the arm's in force, which runs already."""
        for _ in range(2 * len(self._lengths)):
            rival = next(self._rivals)
            if self._not_before[rival] <= self.steps:
                break
        else:
            self._left = self._wait
            return
        self._rival = rival
        # Its acceptance length is of a while ago.
        self._forget(rival, 0.5)
        self._block, self._ratios, self._lost = [], [], 0.0

    def _is_hopeless(self, own: float) -> bool:
        """Whether the rival is slower even if it accepts far more than it seems to.

        own: tokens per second of the arm in force.
        """
        requests = self._requests[self._arm]
        accepted = self._tokens[self._arm] - requests
        # Three standard errors of a Poisson count, and some for the first few.
        bound = 1 + (accepted + 3 * math.sqrt(max(accepted, 0)) + 4) / requests
        bound = min(bound, 1.0 + self._lengths[self._arm])
        return bound * self._block_speed() < 0.9 * own

    def _start(self, arm: int) -> None:
        """Schedule an arm; its first step is drafted for without prompt rows."""
        self._arm, self._unsettled = arm, 1

    def _follow(self, num_running: int, num_tokens: int) -> None:
        """Watch the acceptance length of the arm in force between probes."""
        self._recent_tokens += num_tokens
        self._recent_requests += num_running
        if self._recent_requests < RECENT:
            return
        recent = self._recent_tokens / self._recent_requests
        if abs(recent / self._acceptance_length(self.current) - 1) > CHANGED:
            for arm in range(len(self._lengths)):
                self._forget(arm, RECENT / max(self._requests[arm], RECENT))
            self._tokens[self.current] = self._recent_tokens
            self._requests[self.current] = self._recent_requests
            self._not_before = [0.0] * len(self._lengths)
            self._wait = FIRST_WAIT
            self._left = min(self._left, FIRST_WAIT)
        elif self._requests[self.current] > 8 * RECENT:
            self._forget(self.current, 0.5)
        self._recent_tokens = self._recent_requests = 0.0

    def _forget(self, arm: int, kept: float) -> None:
        self._tokens[arm] *= kept
        self._requests[arm] *= kept

    def _block_speed(self) -> float:
        """Requests per second of the block's steps, by their mean time: where few steps
        have drafts, the median step has none."""
        limit = OUTLIER * median(self._block)
        return 1 / fmean(time for time in self._block if time <= limit)

    def _end_block(self) -> bool:
        speed = self._block_speed()
        self._block = []
        assert self._rival is not None
        if self._arm == self.current:
            self._own_speed = speed
            self._start(self._rival)
            return True
        self._ratios.append(math.log(speed / self._own_speed))
        gain, error = self._gain()
        if abs(gain) > CLEAR * error or len(self._ratios) == MAX_PAIRS:
            # Between equals plain decoding is the simpler.
            self._end_probe(wins=gain > (LEAST_GAIN if self._rival else 0.0))
        else:
            self._start(self.current)
        return True

    def _end_probe(self, wins: bool) -> None:
        rival = self._rival
        assert rival is not None
        self._rival = None
        self._recent_tokens = self._recent_requests = 0.0
        if wins:
            if self.steps - self._changed_at > 2 * RECENT:
                # The traffic has changed: what others accepted before says little.
                for arm in range(len(self._lengths)):
                    self._forget(arm, 1.0 if arm == rival else 0.0)
                self._not_before = [0.0] * len(self._lengths)
            self.current, self._changed_at = rival, self.steps
            self._rivals = self._rivals_in_turn()
            self._wait = FIRST_WAIT
        else:
            self._wait = min(2 * self._wait, LAST_WAIT)
            # In steps of the arm in force, which take num_running / own speed seconds.
            steps = self._lost * self._own_speed / max(self.first, 1)
            again = self.steps + max(0.0, steps) / BUDGET
            # More rows do not take less time.
            arms = range(rival, len(self._lengths)) if rival > self.current else [rival]
            for arm in arms:
                self._not_before[arm] = max(self._not_before[arm], again)
        self._left = self._wait
        self._start(self.current)

    def _gain(self) -> tuple[float, float]:
        """Log of the rival's speed over that of the arm in force; standard error."""
        rival, current = self._rival, self.current
        assert rival is not None
        gain = (
            fmean(self._ratios)
            + math.log(self._acceptance_length(rival))
            - math.log(self._acceptance_length(current))
        )
        # A block's median has an error of some per cent, however alike few ratios are;
        # of a single pair nothing is known of it.
        spread = 0.25**2
        if len(self._ratios) > 1:
            spread = max(variance(self._ratios), 0.05**2)
        error = spread / len(self._ratios)
        error += self._relative_variance(rival) + self._relative_variance(current)
        return gain, math.sqrt(error)

    def _acceptance_length(self, arm: int) -> float:
        requests = self._requests[arm]
        return max(1.0, self._tokens[arm] / requests) if arm and requests else 1.0

    def _relative_variance(self, arm: int) -> float:
        """Of the acceptance length: as of a geometric distribution, twice, because one
        text's steps are alike."""
        length = self._acceptance_length(arm)
        return 2 * (length - 1) / length / max(self._requests[arm], 1.0)

    def _rivals_in_turn(self) -> Iterator[int]:
        """Arms to compare the one in force with: plain decoding and its neighbours
        again and again, and between them all others, one at a time."""
        arms, current = len(self._lengths), self.current
        far = 0
        near = [0, current + 1, current - 1] if current else [1, arms // 2, arms - 1]
        near = [
            arm for arm in dict.fromkeys(near) if 0 <= arm < arms and arm != current
        ]
        while True:
            yield from near
            far = (far + max(1, arms // 3)) % arms
            if far != current and far not in near:
                yield far
