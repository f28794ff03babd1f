"""Search a new plan beside the serving process, and say whether to change.

    python -m vllm_ppd.adaptive.replan QUESTION.json ANSWER.json

The search takes up to seconds of one core, so it runs in a process of its own, with
low priority; serving processes are daemons, which may not have children of the
multiprocessing kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vllm_ppd.files import write_json
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.fixed_rows import better_within
from vllm_ppd.search.plan_search import best_plan, served_speed
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import TreePlan

__all__ = ["Replanner", "SearchPace", "better_plan"]

# Relative gain in speed, in some tier, for which trees are changed.
_LEAST_GAIN = 1.03
# Tokens before the first search, and the most before any. Texts differ: a few of them
# are not yet the traffic, and trees found too early stay for a while.
_ENOUGH, _MOST = 1000.0, 50_000.0
# Rests, as multiples of what the search before took: at first, and in the long run. A
# search disturbs a small machine, where it has to share a core with the engine.
_REST, _LONG_REST = 30.0, 100.0


def better_plan(
    evidence: AcceptanceModel,
    profile: LatencyProfile,
    current: TreePlan,
    max_rows: int,
    num_ept: int,
    max_requests: int,
    measured: bool = True,
    max_context: int = 1,
    loads: Collection[tuple[int, int]] = (),
) -> TreePlan | None:
    """The best plan for new evidence, if it is enough better than the current one.

    The last six arguments are those of `best_plan`; without loads all are searched.
    """
    plan, tiers = best_plan(
        evidence,
        profile,
        max_rows,
        num_ept,
        max_requests,
        measured,
        max_context,
        current if loads else None,
        loads,
    )
    for tier in tiers:
        curve = profile.at_context(tier.context).curve(tier.requests)
        plain = 1 / curve.plain_s
        here = served_speed(current, evidence, curve, tier)
        then = plain * tier.gain if tier.speculates else plain
        if then >= _LEAST_GAIN * here:
            return plan
    return None


class SearchPace:
    """When the next search may begin.

    Each needs twice as many tokens as the one before, because a search takes a core for
    a while, and few tokens make plans that soon change again. After it there is a rest
    many times as long as it took, in the long run a hundred times.

    Args:
        by_clock: whether there are rests. Not where ranks must ask in the same step.
    """

    def __init__(self, by_clock: bool):
        self._by_clock = by_clock
        self._enough, self._rest = _ENOUGH, _REST
        self._asked_s = self._rested_s = 0.0

    def due(self, observations: float) -> bool:
        """Whether so many tokens are enough, and the rest is over."""
        rested = not self._by_clock or time.monotonic() >= self._rested_s
        return rested and observations >= self._enough

    def begun(self) -> None:
        self._asked_s = time.monotonic()

    def ended(self) -> None:
        now = time.monotonic()
        self._rested_s = now + self._rest * (now - self._asked_s)
        self._rest = min(2 * self._rest, _LONG_REST)
        self._enough = min(2 * self._enough, _MOST)


class Replanner:
    """One search at a time in a process of its own."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def busy(self) -> bool:
        return self._process is not None

    def submit(
        self,
        evidence: AcceptanceModel,
        profile: LatencyProfile | None,
        current: TreePlan,
        **limits: Any,
    ) -> None:
        """Start `better_plan` with these arguments; without a profile `better_within`,
        which needs none."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vllm_ppd_")
        question, answer = self._files()
        answer.unlink(missing_ok=True)
        write_json(
            question,
            {
                "evidence": evidence.to_dict(),
                "profile": None if profile is None else profile.to_dict(),
                "current": current.to_dict(),
                "limits": limits,
            },
        )
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm_ppd.adaptive.replan",
                str(question),
                str(answer),
            ],
            # Its matrices are small: more threads would only wait for each other.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def take(self, wait: bool = False) -> TreePlan | None:
        """The better plan once it is found, else None.

        A search that failed is as one that found nothing; serving goes on.
        """
        process = self._process
        if process is None:
            return None
        if wait:
            process.wait()
        elif process.poll() is None:
            return None
        self._process = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._files()[1].read_text())
            return None if found is None else TreePlan.from_dict(found)
        return None

    def close(self) -> None:
        """Stop a search that goes on and remove its files."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _files(self) -> tuple[Path, Path]:
        assert self._folder is not None
        folder = Path(self._folder.name)
        return folder / "question.json", folder / "answer.json"


def _main(question: str, answer: str) -> None:
    # The server's worker may be bound to cores, which it needs for itself.
    with contextlib.suppress(AttributeError, OSError):
        os.nice(19)
    with contextlib.suppress(AttributeError, OSError):
        # Only what nobody else wants of a core; nice alone still takes a share of it.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(AttributeError, OSError):
        others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
        if others:
            os.sched_setaffinity(0, others)
    asked: dict[str, Any] = json.loads(Path(question).read_text())
    evidence = AcceptanceModel.from_dict(asked["evidence"])
    current = TreePlan.from_dict(asked["current"])
    if asked["profile"] is None:
        plan = better_within(
            evidence, current, least_gain=_LEAST_GAIN, **asked["limits"]
        )
    else:
        profile = LatencyProfile.from_dict(asked["profile"])
        plan = better_plan(evidence, profile, current, **asked["limits"])
    write_json(answer, None if plan is None else plan.to_dict())


if __name__ == "__main__":
    _main(*sys.argv[1:])
