"""The counters of V2: steps are counted on the host, some steps late.

What a step did is known on the device alone. Every eighth step it is copied to the
host, which never waits for the copy.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from vllm.v1.worker.gpu.async_utils import async_copy_to_np

from vllm_ppd.engine.counters import StepCounts
from vllm_ppd.engine.v2.request_trees import RequestTrees
from vllm_ppd.engine.v2.step_trees import StepTrees
from vllm_ppd.trees.layout import TreeTables


class DeviceStepLog:
    """Counts every eighth step, as `StepCounts` does on V1.

    Args:
        requests: the trees.
        counts: where the sums are published.
    """

    def __init__(self, requests: RequestTrees, counts: StepCounts):
        self._tables = TreeTables(requests.menu, first_soft_id=0)
        self._num_prompted: np.ndarray = requests.num_prompted.cpu().numpy()
        self._counts = counts
        # Copies on their way, and what is recorded behind each; None on a CPU.
        self._copies: deque[tuple[np.ndarray, torch.cuda.Event | None]] = deque()

    def after_step(self, num_running: int, step: StepTrees | None) -> None:
        """Note a step of so many requests; None for a plain one."""
        if step is None or step.walk is None:
            self._counts.after_plain_step(num_running)
        elif self._counts.counts_next():
            self._copy(step)
        self._collect()

    def line(self) -> str:
        """What was counted since the last line."""
        self._collect()
        return self._counts.line()

    def _copy(self, step: StepTrees) -> None:
        walk = step.walk
        assert walk is not None
        columns = (step.tree_ids, step.num_rows, walk.num_sampled)
        facts = torch.cat([*(column[:, None] for column in columns), walk.paths], 1)
        event = torch.cuda.Event() if facts.is_cuda else None
        self._copies.append((async_copy_to_np(facts), event))
        if event is not None:
            event.record()

    def _collect(self) -> None:
        while self._copies:
            facts, event = self._copies[0]
            if event is not None and not event.query():
                return
            self._copies.popleft()
            tree_ids, num_rows, lengths = facts[:, :3].T
            num_prompted = self._num_prompted[tree_ids]
            self._counts.add(
                self._tables, tree_ids, num_rows, lengths, facts[:, 3:], num_prompted
            )
            self._counts.log_if_due()
