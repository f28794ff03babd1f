"""What served steps add up to, where a metrics reader in another process sees it.

A worker counts into an array that is mapped from a file, so counting costs nothing
and the reader is never behind; a small JSON file beside it says what the numbers are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vllm_ppd.files import write_json
from vllm_ppd.trees.step import TreeStep
from vllm_ppd.trees.verify import TreeWalk

__all__ = ["SOURCES", "Count", "Slot", "StepCounts", "read_counts"]

SOURCES = ("prompt_tokens", "bigram", "earlier_text")


class Slot(IntEnum):
    """Where a number lies among the counts; sources and states have several."""

    SPECULATING = 0
    PLAIN = 1
    TOKENS = 2
    ROWS = 3
    CANDIDATES = 4
    TIER = 5
    CHANGES = 6
    FIRST_SOURCE = 7
    FIRST_STATE = 7 + len(SOURCES)


class Count(NamedTuple):
    """A number with its name and labels."""

    name: str
    labels: dict[str, str]
    value: float


def _slots(num_states: int) -> list[tuple[str, dict[str, str]]]:
    return [
        ("request_steps", {"kind": "speculating"}),
        ("request_steps", {"kind": "plain"}),
        ("emitted_tokens", {}),
        ("rows", {}),
        ("candidates", {}),
        ("tier_max_requests", {}),
        ("plan_changes", {}),
        *(("accepted_tokens", {"source": source}) for source in SOURCES),
        *(("state_steps", {"state": str(state)}) for state in range(num_states)),
    ]


class StepCounts:
    """Sums over the steps of one worker.

    Args:
        num_states: m + 1.
        folder: where to publish them; None keeps them to this process.
        labels: of all counts, as Prometheus has them.
    """

    def __init__(
        self,
        num_states: int,
        folder: str | os.PathLike[str] | None = None,
        labels: dict[str, str] | None = None,
    ):
        slots = _slots(num_states)
        self.values: np.ndarray = np.zeros(len(slots))
        if folder is None or not Path(folder).is_dir():
            return
        path = Path(folder) / f"{os.getpid()}.bin"
        # As a plain array, which is quicker to write to than one that is called a map.
        self.values = np.asarray(np.memmap(path, np.float64, "w+", shape=len(slots)))
        description = [[name, {**(labels or {}), **more}] for name, more in slots]
        write_json(path.with_suffix(".json"), description)

    def add_plain(self, running: int) -> None:
        """A step in which nobody guessed: one row and one token per request."""
        for slot in (Slot.PLAIN, Slot.TOKENS, Slot.ROWS):
            self.values[slot] += running

    def add(self, step: TreeStep, walk: TreeWalk, states: np.ndarray) -> None:
        """A verified step.

        states: [B] prompt tokens whose guesses each request's tree was filled with.
        """
        # Rows behind a bare root are padding.
        guessing = np.minimum(step.num_rows, step.tables.num_rows[step.states]) > 1
        speculating = int(guessing.sum())
        values = self.values
        values[Slot.SPECULATING] += speculating
        values[Slot.PLAIN] += len(guessing) - speculating
        values[Slot.TOKENS] += walk.lengths.sum()
        values[Slot.ROWS] += step.num_rows.sum()
        values[Slot.CANDIDATES] += step.num_nodes.sum() - len(guessing)
        level = np.arange(walk.paths.shape[1])
        accepted = (level > 0) & (level < walk.lengths[:, None])
        chain = accepted & step.tables.on_chain[step.states[:, None], walk.paths]
        prompted = accepted & ~chain & (level <= states[:, None])
        chains, prompts = int(chain.sum()), int(prompted.sum())
        values[Slot.FIRST_SOURCE : Slot.FIRST_STATE] += (
            prompts,
            int(accepted.sum()) - chains - prompts,
            chains,
        )
        num_states = len(values) - Slot.FIRST_STATE
        values[Slot.FIRST_STATE :] += np.bincount(
            states[guessing], minlength=num_states
        )

    def set_plan(self, tier_max_requests: int | None, changes: int) -> None:
        """The tier that serves now (None: any number of requests), and how often the
        traffic has changed the plan."""
        self.values[Slot.TIER] = tier_max_requests or 0
        self.values[Slot.CHANGES] = changes

    def line(self, since: np.ndarray) -> str:
        """In words, what was counted since ``values`` were these."""
        seen = self.values - since
        requests = max(1.0, seen[Slot.SPECULATING] + seen[Slot.PLAIN])
        tier = self.values[Slot.TIER]
        limit = f"<= {tier:.0f}" if tier else "any number of"
        text = (
            f"PPD: {seen[Slot.TOKENS] / requests:.2f} tokens and "
            f"{seen[Slot.ROWS] / requests:.1f} rows per request and step; guesses in "
            f"{seen[Slot.SPECULATING] / requests:.0%} of steps; tier for {limit} "
            "requests"
        )
        sources = seen[Slot.FIRST_SOURCE : Slot.FIRST_STATE]
        accepted = sources.sum()
        if accepted:
            shares = ", ".join(
                f"{share:.0%} from {name.replace('_', ' ')}"
                for name, share in zip(SOURCES, sources / accepted, strict=True)
            )
            right = accepted / max(1.0, seen[Slot.CANDIDATES])
            text += f"; {right:.0%} of candidates right, {shares}"
        states = seen[Slot.FIRST_STATE :]
        if states.sum():
            text += "; steps by prompt tokens at hand: " + ", ".join(
                f"{state}: {share:.0%}"
                for state, share in enumerate(states / states.sum())
            )
        return text


def read_counts(folder: str | os.PathLike[str]) -> Iterator[Count]:
    """All workers' counts of a folder; equal names and labels are added up.

    Of tiers the newest worker's counts. Files that are damaged, or being made, are
    left out.
    """
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    files = [(path.stat().st_ctime, path) for path in Path(folder).glob("*.json")]
    for _, path in sorted(files):
        try:
            slots: list[Any] = json.loads(path.read_text())
            values = np.fromfile(path.with_suffix(".bin"))
        except (OSError, ValueError):
            continue
        if len(slots) != len(values):
            continue
        for (name, labels), value in zip(slots, values.tolist(), strict=True):
            key = name, tuple(sorted(labels.items()))
            earlier = 0.0 if name == "tier_max_requests" else sums.get(key, 0.0)
            sums[key] = earlier + value
    for (name, labels), value in sums.items():
        yield Count(name, dict(labels), value)
