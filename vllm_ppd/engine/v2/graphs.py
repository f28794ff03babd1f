"""Which full CUDA graphs are captured: those of the steps that a menu makes.

vLLM knows one row count per request, and looks a step up by its number of tokens alone:
a load between two sizes of its own row count finds the graphs of another one, which do
not fit, and runs in pieces.
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

# Most padding of a load of plain steps, as a part of it: an eighth costs next to
# nothing. Other steps are padded by half at most, which leaves few enough graphs.
_PARTS = 8
# Rows of a step, above which a graph saves nothing that could be measured.
_MAX_STEP_ROWS = 1024


def served_graphs(row_bounds: list[int], max_requests: int) -> list[tuple[int, int]]:
    """(requests, rows per request) of the steps that an engine makes.

    The scheduler may choose any entry of the menu at any load.

    Args:
        row_bounds: rows per request of the menu's entries.
        max_requests: most that run at once.
    """
    sizes = [
        (requests, 1)
        for requests in range(1, max_requests + 1)
        if requests == max_requests or requests % _step(requests) == 0
    ]
    for rows in row_bounds:
        limit = min(max_requests, _MAX_STEP_ROWS // rows)
        bits = range(limit.bit_length())
        loads = {1 << bit for bit in bits} | {3 << bit for bit in bits} | {limit}
        sizes += [(load, rows) for load in sorted(loads) if 1 <= load <= limit]
    return sizes


def _step(requests: int) -> int:
    """Distance of the loads that are captured around this one, a power of two."""
    return 1 << max(0, (requests // _PARTS).bit_length() - 1)


@contextmanager
def graphs_of(sizes: Iterable[tuple[int, int]]) -> Iterator[None]:
    """While vLLM lists the graphs to capture, let these be its full ones.

    Args:
        sizes: (requests, rows per request); those of too many rows are left out.
    """
    listed = sorted(set(sizes))

    class TreeGraphManager(ModelCudaGraphManager):
        def _init_candidates(self) -> None:
            super()._init_candidates()
            _replace_full_graphs(self, listed)

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
    max_rows = min(_MAX_STEP_ROWS, scheduler.max_num_batched_tokens)
    by_rows = defaultdict(list)
    for requests, rows in sizes:
        if requests <= manager.max_num_reqs and requests * rows <= max_rows:
            by_rows[rows].append(
                BatchExecutionDescriptor(
                    cg_mode=full,
                    num_tokens=requests * rows,
                    num_reqs=requests,
                    uniform_token_count=rows,
                )
            )
    captured = [desc for descs in by_rows.values() for desc in descs]
    # The largest comes first: the others reuse its memory.
    captured.sort(key=lambda desc: desc.num_tokens, reverse=True)
    manager._capture_descs[full] = captured
    pieces = {
        key: [desc for desc in descs if desc.cg_mode != full]
        for key, descs in manager._candidates.items()
    }
    manager._candidates = pieces
    largest = captured[0].num_tokens if captured else 0
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
