"""The log and metrics of a step, counted on the device and read some steps late."""

from __future__ import annotations

import torch

from vllm_ppd.engine.counters import EVERY, SOURCES, Slot, StepCounts, StepLog
from vllm_ppd.engine.v2.host_copy import HostCopy
from vllm_ppd.engine.v2.request_trees import RequestTrees
from vllm_ppd.engine.v2.step_trees import StepTrees

__all__ = ["DeviceStepLog", "count_step"]


class DeviceStepLog:
    """Counts every eighth step, as on V1; the host never waits for what is counted.

    Args:
        requests: the trees.
        counts: where the sums are published.
    """

    def __init__(self, requests: RequestTrees, counts: StepCounts):
        self._num_prompted = requests.num_prompted
        self._log = StepLog(counts)
        # Of verified steps; plain ones are known on the host.
        device = requests.num_prompted.device
        self._sums = torch.zeros(len(counts.values), dtype=torch.int64, device=device)
        self._copy = HostCopy(self._sums)
        self._plain = 0
        self._steps = 0

    def after_step(self, num_running: int, step: StepTrees | None) -> None:
        """Note a step of so many requests; None for a plain one."""
        self._steps += 1
        if self._steps % EVERY == 0:
            if step is None:
                self._plain += num_running
            else:
                count_step(self._sums, step, self._num_prompted)
            self._copy.start()
        arrived = self._copy.take()
        if arrived is None:
            return
        arrived[[Slot.PLAIN, Slot.TOKENS, Slot.ROWS]] += self._plain
        self._log.counts.values[:] = arrived
        self._log.log_if_due()

    def line(self) -> str:
        """What was counted since the last line."""
        return self._log.line()


def count_step(
    counts: torch.Tensor,  # int64 [Slot.FIRST_PROMPTED + num_prompted]: added to
    step: StepTrees,
    num_prompted: torch.Tensor,  # int64 [S]: the num_prompted that each tree is for
) -> None:
    """Add one verified step: the same sums as `StepCounts.add`, without a host read."""
    tables, walk, ids, num_rows = step.tables, step.walk, step.tree_ids, step.num_rows
    assert walk is not None
    prompted_depth = num_prompted[ids]
    nodes = torch.minimum(num_rows, tables.num_nodes[ids])
    # Rows behind a root-only tree are padding.
    speculates = torch.minimum(num_rows, tables.num_rows[ids]) > 1
    level = torch.arange(walk.paths.shape[1], device=ids.device)
    accepted = (level > 0) & (level < walk.num_sampled[:, None])
    on_ngram = tables.on_ngram[ids].gather(1, walk.paths.long()) > 0
    ngram = accepted & on_ngram
    prompted = accepted & ~on_ngram & (level <= prompted_depth[:, None])
    ngrams, prompts, speculating = ngram.sum(), prompted.sum(), speculates.sum()
    sources = {
        "prompt": prompts,
        "bigram": accepted.sum() - ngrams - prompts,
        "ngram": ngrams,
    }
    batch = len(ids)
    counts[: Slot.FIRST_PROMPTED] += torch.stack(
        [
            speculating,
            batch - speculating,
            walk.num_sampled.sum(),
            num_rows.sum(),
            nodes.sum() - batch,
            *(sources[name] for name in SOURCES),
        ]
    )
    counts[Slot.FIRST_PROMPTED :].scatter_add_(
        0, prompted_depth, speculates.to(counts.dtype)
    )
