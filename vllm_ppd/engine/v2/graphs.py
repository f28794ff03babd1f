"""Which CUDA graphs are captured: those of the steps that a plan makes, and no others.

vLLM captures every row count of its schedule at every one of its sizes, and looks a
step up by its number of tokens alone: a load between two sizes of its own row count
finds the graphs of another one, which do not fit, and runs in pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import vllm.v1.worker.gpu.model_runner as model_runner
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    ModelCudaGraphManager,
)

__all__ = ["graphs_of", "measured_graphs", "served_graphs"]

# Most padding of a load, as a part of it: an eighth costs next to nothing.
_PARTS = 8
# Rows of a step, above which a graph saves nothing that could be measured.
_MOST_ROWS = 1024


def served_graphs(
    schedule: list[tuple[int, int, int]] | None, drafts: int, max_requests: int
) -> list[tuple[int, int]]:
    """(requests, rows per request) of the steps that tiers of load make.

    Args:
        schedule: vLLM's (from, to, rows besides the root); None for one tier.
        drafts: rows besides the root in that case.
        max_requests: most that run at once.
    """
    found = []
    for first, last, more in schedule or [(1, max_requests, drafts)]:
        # A step with fewer requests than its tier, some having ended, is padded.
        found += [
            (requests, more + 1)
            for requests in range(first, last + 1)
            if requests == last or requests % _step(requests) == 0
        ]
    return found


def _step(requests: int) -> int:
    """Distance of the loads that are captured around this one, a power of two."""
    return 1 << max(0, (requests // _PARTS).bit_length() - 1)


def measured_graphs(rows: list[int], max_requests: int) -> list[tuple[int, int]]:
    """The same for measuring a machine: powers of two of requests."""
    loads = [1 << bit for bit in range(max_requests.bit_length())]
    return [(load, count) for load in loads for count in rows]


@contextmanager
def graphs_of(sizes: Iterable[tuple[int, int]]) -> Iterator[None]:
    """While vLLM lists the graphs to capture, let these be its full ones.

    Args:
        sizes: (requests, rows per request); those of too many rows are left out.
    """
    wanted = sorted(set(sizes))

    class TreeGraphManager(ModelCudaGraphManager):
        def _init_candidates(self) -> None:
            super()._init_candidates()
            _replace_full_graphs(self, wanted)

    stock = model_runner.ModelCudaGraphManager
    model_runner.ModelCudaGraphManager = TreeGraphManager
    try:
        yield
    finally:
        model_runner.ModelCudaGraphManager = stock


def _replace_full_graphs(manager: Any, sizes: list[tuple[int, int]]) -> None:
    full = CUDAGraphMode.FULL
    if not manager._capture_descs.get(full) or manager.ubatch_runner is not None:
        # The user wants none, or graphs of two halves, which vLLM lists itself.
        return
    scheduler = manager.vllm_config.scheduler_config
    most = min(_MOST_ROWS, scheduler.max_num_batched_tokens)
    by_rows = defaultdict(list)
    for requests, rows in sizes:
        if requests <= manager.max_num_reqs and requests * rows <= most:
            by_rows[rows].append(
                BatchExecutionDescriptor(
                    cg_mode=full,
                    num_tokens=requests * rows,
                    num_reqs=requests,
                    uniform_token_count=rows,
                )
            )
    found = [desc for descs in by_rows.values() for desc in descs]
    # The largest comes first: the others find its memory.
    found.sort(key=lambda desc: desc.num_tokens, reverse=True)
    manager._capture_descs[full] = found
    pieces = {
        key: [desc for desc in descs if desc.cg_mode != full]
        for key, descs in manager._candidates.items()
    }
    manager._candidates = pieces
    largest = found[0].num_tokens if found else 0
    ends = {rows: [d.num_tokens for d in descs] for rows, descs in by_rows.items()}
    for tokens in range(largest + 1):
        # Of each row count the smallest that has room.
        fitting = [
            descs[place]
            for rows, descs in by_rows.items()
            if (place := bisect_left(ends[rows], tokens)) < len(descs)
        ]
        key = tokens, 0  # no LoRA
        pieces[key] = fitting + pieces.get(key, [])
