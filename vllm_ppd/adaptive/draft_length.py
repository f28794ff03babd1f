"""Which draft length each load decodes with: stands until the controller lands."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DraftLengthController", "load_buckets"]


def load_buckets(max_num_running: int) -> list[int]:
    """Largest number of running requests of each load bucket: 1, 2, 4, 8, ..."""
    ends = []
    end = 1
    while end < max_num_running:
        ends.append(end)
        end *= 2
    return [*ends, max_num_running]


class DraftLengthController:
    def __init__(
        self,
        draft_lengths: Sequence[int],
        max_num_running: int,
        prior: Sequence[int] | None = None,
        uniform: bool = False,
        adapts: bool = True,
    ):
        self.schedule = [0] * (max_num_running + 1)
        buckets = load_buckets(max_num_running)
        first = 1
        for end, length in zip(buckets, prior or [0] * len(buckets), strict=True):
            for n in range(first, end + 1):
                self.schedule[n] = length
            first = end + 1

    def observe(
        self, num_running: int, draft_length: int, num_tokens: int, seconds: float
    ) -> None:
        pass

    def take_changes(self) -> list[str]:
        return []

    def hold(self, draft_length: int) -> None:
        """Decode every load with this draft length from now on; for measurements."""
        self.schedule[1:] = [draft_length] * (len(self.schedule) - 1)

    def snapshot(self) -> dict:
        return {"observed_steps": 100}
