"""PPD's own metrics, beside vLLM's: under /metrics and in ``LLM.get_metrics()``.

A worker counts into an array that is mapped from a file, so counting costs nothing and
the reader is never behind; a small JSON file beside it says what the numbers are. A
collector in the front-end process reads them when Prometheus asks. With several API
servers vLLM collects by another way, which does not know collectors: there is the log
line only.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from vllm_ppd.files import write_json
from vllm_ppd.trees.layout import TreeStep, TreeTables
from vllm_ppd.trees.verify import TreeWalk

logger = init_logger("vllm.ppd")

# Where accepted draft tokens come from.
SOURCES = ("prompt", "bigram", "ngram")
# One step in so many is counted; a line is logged every so many seconds of traffic.
EVERY = 8
_LOG_SECONDS = 10.0
# Processes that this one starts find the folder by it.
_FOLDER = "PPD_METRICS_FOLDER"
_published = False
_HELP = {
    "request_steps": "Steps of requests, by kind: with draft rows, and plain.",
    "emitted_tokens": "Tokens that those steps emitted; over request_steps it is the "
    "mean acceptance length.",
    "rows": "Rows that those steps scheduled for decoding.",
    "draft_tokens": "Draft tokens among those rows.",
    "accepted_tokens": "Accepted draft tokens, by their source.",
    "num_prompted_steps": "Steps with draft rows, by how deep the prompt rows of the "
    "request's last step reach.",
}


class Slot(IntEnum):
    """Where a number lies among the counts; sources and num_prompted have several."""

    SPECULATING = 0
    PLAIN = 1
    TOKENS = 2
    ROWS = 3
    DRAFT_TOKENS = 4
    FIRST_SOURCE = 5
    FIRST_PROMPTED = 5 + len(SOURCES)


def _slots(num_prompted: int) -> list[tuple[str, dict[str, str]]]:
    return [
        ("request_steps", {"kind": "speculating"}),
        ("request_steps", {"kind": "plain"}),
        ("emitted_tokens", {}),
        ("rows", {}),
        ("draft_tokens", {}),
        *(("accepted_tokens", {"source": source}) for source in SOURCES),
        *(
            ("num_prompted_steps", {"num_prompted": str(depth)})
            for depth in range(num_prompted)
        ),
    ]


class StepCounts:
    """Sums over every eighth step of one worker, logged every ten seconds of traffic.

    Args:
        num_prompted: m + 1, the values that num_prompted can have.
        folder: where to publish them; None keeps them to this process.
        labels: of all counts, as Prometheus has them.
    """

    def __init__(
        self,
        num_prompted: int,
        folder: str | os.PathLike[str] | None = None,
        labels: dict[str, str] | None = None,
    ):
        slots = _slots(num_prompted)
        self.values: np.ndarray = np.zeros(len(slots))
        self._steps = 0
        self._since, self._logged = time.monotonic(), self.values.copy()
        if folder is None or not Path(folder).is_dir():
            return
        # A process may have several engines, each with a file of its own.
        handle, path = tempfile.mkstemp(".bin", dir=folder)
        os.close(handle)
        # As a plain array, which is quicker to write to than one that is called a map.
        self.values = np.asarray(np.memmap(path, np.float64, "w+", shape=len(slots)))
        description = [[name, {**(labels or {}), **more}] for name, more in slots]
        write_json(Path(path).with_suffix(".json"), description)

    def counts_next(self) -> bool:
        """Whether the step that has just run is to be counted; to be asked once."""
        self._steps += 1
        return self._steps % EVERY == 0

    def after_plain_step(self, num_running: int) -> None:
        """Note a plain step of so many requests."""
        if self.counts_next():
            self.add_plain(num_running)
            self.log_if_due()

    def after_step(
        self, step: TreeStep, walk: TreeWalk, num_prompted: np.ndarray
    ) -> None:
        """Note a verified step; num_prompted as of `add`."""
        if self.counts_next():
            facts = step.tree_ids, step.num_rows, walk.lengths, walk.paths
            self.add(step.tables, *facts, num_prompted)
            self.log_if_due()

    def add_plain(self, num_running: int) -> None:
        """A plain step: one row and one token per request."""
        for slot in (Slot.PLAIN, Slot.TOKENS, Slot.ROWS):
            self.values[slot] += num_running

    def add(
        self,
        tables: TreeTables,
        tree_ids: np.ndarray,
        num_rows: np.ndarray,
        lengths: np.ndarray,
        paths: np.ndarray,
        num_prompted: np.ndarray,
    ) -> None:
        """A verified step of B requests.

        Args:
            tables: of the trees.
            tree_ids: [B].
            num_rows: [B] scheduled rows, root included.
            lengths: [B] emitted tokens.
            paths: [B, D + 1] accepted nodes, root first; anything after `lengths`.
            num_prompted: [B] how deep the prompt rows reached that each tree was filled
                from.
        """
        batch, values = len(tree_ids), self.values
        # Rows behind a root-only tree are padding.
        speculates = np.minimum(num_rows, tables.num_rows[tree_ids]) > 1
        level = np.arange(paths.shape[1])
        accepted = (level > 0) & (level < lengths[:, None])
        ngram = accepted & tables.on_ngram[tree_ids[:, None], paths]
        prompt = accepted & ~ngram & (level <= num_prompted[:, None])
        bigram = accepted & ~ngram & ~prompt
        values[: Slot.FIRST_PROMPTED] += (
            speculates.sum(),
            batch - speculates.sum(),
            lengths.sum(),
            num_rows.sum(),
            np.minimum(num_rows, tables.num_nodes[tree_ids]).sum() - batch,
            prompt.sum(),
            bigram.sum(),
            ngram.sum(),
        )
        values[Slot.FIRST_PROMPTED :] += np.bincount(
            num_prompted[speculates], minlength=len(values) - Slot.FIRST_PROMPTED
        )

    def log_if_due(self) -> None:
        if time.monotonic() - self._since > _LOG_SECONDS:
            logger.info(self.line())
            self._since, self._logged = time.monotonic(), self.values.copy()

    def line(self) -> str:
        """In words, what was counted since the last line that was logged."""
        seen = self.values - self._logged
        requests = max(1.0, seen[Slot.SPECULATING] + seen[Slot.PLAIN])
        text = (
            f"PPD: acceptance length {seen[Slot.TOKENS] / requests:.2f}, "
            f"{seen[Slot.ROWS] / requests:.1f} rows per request and step, drafts in "
            f"{seen[Slot.SPECULATING] / requests:.0%} of steps"
        )
        sources = seen[Slot.FIRST_SOURCE : Slot.FIRST_PROMPTED]
        accepted = sources.sum()
        if accepted:
            rate = accepted / max(1.0, seen[Slot.DRAFT_TOKENS])
            shares = ", ".join(
                f"{name} {share:.0%}"
                for name, share in zip(SOURCES, sources / accepted, strict=True)
            )
            text += f"; {rate:.0%} of draft tokens accepted: {shares}"
        return text


class _PPDCollector(Collector):
    """The sums of all workers' counts in a folder."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def collect(self) -> Iterator[Metric]:
        """Files that are damaged, or being made, are left out."""
        sums: dict[tuple[str, Any], float] = defaultdict(float)
        for path in sorted(self._folder.glob("*.json")):
            try:
                slots: list[Any] = json.loads(path.read_text())
                values = np.fromfile(path.with_suffix(".bin"))
            except (OSError, ValueError):
                continue
            if len(slots) == len(values):
                for (name, labels), value in zip(slots, values.tolist(), strict=True):
                    sums[name, tuple(sorted(labels.items()))] += value
        families: dict[str, CounterMetricFamily] = {}
        for (name, labels), total in sums.items():
            if name not in families:
                text = f"{_HELP[name]} One step in eight counts."
                families[name] = CounterMetricFamily(
                    f"vllm:ppd_{name}", text, labels=[label for label, _ in labels]
                )
            families[name].add_metric([value for _, value in labels], total)
        yield from families.values()


def publish_metrics() -> None:
    """In the front end, before the workers start: make the folder and its reader.

    Once per process; engines that it starts later share both. A folder that the
    environment names already is that of a process which started this one.
    """
    global _published
    if _published:
        return
    _published = True
    folder = tempfile.mkdtemp(prefix="vllm_ppd_metrics_")
    os.environ[_FOLDER] = folder
    REGISTRY.register(_PPDCollector(folder))
    owner = os.getpid()

    def remove() -> None:
        # A forked child inherits this, and must leave the folder alone.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def counts_of(vllm_config: Any, num_prompted: int, publish: bool) -> StepCounts:
    """The counts of a worker; with ``publish`` the front end's metrics show them.

    Ranks of a tensor-parallel group count the same, so one of them publishes.
    """
    labels = {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }
    folder = os.environ.get(_FOLDER) if publish else None
    return StepCounts(num_prompted, folder, labels)
