"""One bar for all runs, with the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["Progress"]

_TICK_S = 1.0
# Until the first run is examined.
_GUESS_S = 8.0


class Progress:
    """Counts seconds: those that runs may train for, and those of examining them."""

    def __init__(self, training_s: list[float], quiet: bool = False) -> None:
        self._left = list(training_s)
        self._overhead: list[float] = []
        self._begun = time.monotonic()
        self._now: tuple[float, float] | None = None  # start, expected seconds
        self._name = ""
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=1,
            bar_format="|{bar:30}| {desc}",
            disable=quiet,
            leave=False,
        )
        self._done = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """The next run, while it is made."""
        training = self._left[0]
        with self._lock:
            self._now = time.monotonic(), training + self._mean_overhead()
            self._name = name
        try:
            yield
        finally:
            with self._lock:
                spent = time.monotonic() - self._now[0]
                self._overhead.append(max(0.0, spent - training))
                self._left.pop(0)
                self._now = None

    def say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        self._done.set()
        self._bar.close()

    def seconds_left(self) -> float:
        """What the runs that are not finished should take."""
        waiting = self._left if self._now is None else self._left[1:]
        left = sum(waiting) + len(waiting) * self._mean_overhead()
        if self._now is not None:
            start, expected = self._now
            left += max(0.0, expected - (time.monotonic() - start))
        return left

    def _mean_overhead(self) -> float:
        if not self._overhead:
            return _GUESS_S
        return sum(self._overhead) / len(self._overhead)

    def _tick(self) -> None:
        while not self._done.wait(_TICK_S):
            with self._lock:
                left = self.seconds_left()
                spent = time.monotonic() - self._begun
                self._bar.total, self._bar.n = spent + left, spent
                self._bar.set_description_str(
                    f"{self._name}: {left / 60:.0f} min left, runs: {len(self._left)}"
                )
