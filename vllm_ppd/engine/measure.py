"""The machine's latency profile: found on file, or measured before requests are served.

The workers measure after their warm-up: made-up requests are decoded with trees of
fixed sizes, exactly as the scheduler would have it. What is timed is all that a worker
does: layout, forward, verification, KV moves, drafting. Coarse points come first, so
that whatever the time budget allows is a usable profile.
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import vllm
from tqdm import tqdm
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)

import vllm_ppd
from vllm_ppd.engine.settings import ServingSettings
from vllm_ppd.files import FormatError
from vllm_ppd.search.latency import LatencyProfile, MeasurementError, cache_file
from vllm_ppd.trees.tree import SparseTree

__all__ = [
    "CONTEXT",
    "TIMED",
    "UNTIMED",
    "MeasuredRunner",
    "MeasuredVisit",
    "blocks_of",
    "known_profile",
    "measured_profile",
    "profile_key",
    "scheduled",
    "tree_of_rows",
]

logger = init_logger("vllm.ppd")

# Tokens of a made-up request when it begins to decode.
CONTEXT = 128
# A visit decodes one load with each row count in turn, for trees are chosen by ratios
# and a machine's speed drifts. Of each row count the first step has no drafts yet, and
# the second warms up.
UNTIMED, TIMED = 2, 3
# A step with more rows in all is far past where drafting pays.
_MAX_STEP_ROWS = 512
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Loads by how much their answer tells; each round visits them all.
_LOADS = (1, 4, 16, 2, 8, 64, 32)
_ROUNDS = 3


class MeasuredVisit(Protocol):
    """Made-up requests of one load."""

    def seconds(self, rows: int) -> list[float]:
        """Seconds of each timed step with so many rows per request."""

    def close(self) -> None:
        """Free the requests."""


class MeasuredRunner(Protocol):
    """A model runner that can be measured."""

    max_num_running: int
    max_step_rows: int
    """Most rows of a step."""
    row_counts: list[int] | None
    """Rows per request that it can run; None for any."""

    def visit(self, num_running: int, rows: list[int]) -> MeasuredVisit:
        """Requests that will be decoded with each of `rows`."""

    def finish(self) -> None:
        """Serve again what was served before."""


def measured_profile(
    settings: ServingSettings, runner: MeasuredRunner
) -> LatencyProfile | None:
    """Measure and keep the profile; None where this start does not have to.

    All ranks of a tensor-parallel group take part, and all go by rank 0's figures.
    """
    if not settings.measure:
        return None
    group = get_tp_group()
    began = time.monotonic()
    try:
        profile = _measure(settings, runner, quiet=not group.is_first_rank)
    finally:
        runner.finish()
    if group.world_size > 1:
        profile = LatencyProfile.from_dict(
            group.broadcast_object(profile.to_dict(), src=0)
        )
    if not group.is_first_rank:
        return profile
    path = cache_file(profile.key)
    try:
        profile.save(path)
        where = f"kept in {path}"
    except OSError as error:
        where = f"it could not be kept: {error}"
    logger.info(
        "PPD measured this machine in %.1f s (%s)", time.monotonic() - began, where
    )
    return profile


def _measure(
    settings: ServingSettings, runner: MeasuredRunner, quiet: bool
) -> LatencyProfile:
    menu = settings.tree_menu()
    max_rows = menu.max_rows
    rows = [count for count in _ROWS if count < max_rows] + [max_rows]
    if runner.row_counts is not None:
        rows = [count for count in runner.row_counts if count <= max_rows]
    most = min(_MAX_STEP_ROWS, runner.max_step_rows)
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    deadline = time.perf_counter() + settings.measure_seconds
    visits = list(_visits(rows, runner.max_num_running, most))
    cells = sum(len(counts) for _, counts in visits)
    with tqdm(
        total=cells, desc="PPD measures this machine", unit="", disable=quiet
    ) as bar:
        for num_running, counts in visits:
            visit = runner.visit(num_running, counts)
            try:
                for count in counts:
                    first = not times
                    if not first and _agreed(time.perf_counter() > deadline):
                        break
                    times[num_running, count] += visit.seconds(count)
                    bar.update()
            finally:
                visit.close()
            if _agreed(time.perf_counter() > deadline):
                break
        bar.total = bar.n
    # A load without a plain step has nothing to be compared with.
    loads = sorted({load for load, count in times if (load, 1) in times})
    medians = {cell: float(np.median(seconds)) for cell, seconds in times.items()}
    table = np.array([_interpolated(medians, load, rows) for load in loads])
    return LatencyProfile.smoothed(loads, rows, table, settings.profile_key)


def _visits(
    rows: list[int], max_num_running: int, max_step_rows: int
) -> Iterator[tuple[int, list[int]]]:
    """(load, row counts) in the order of measuring: a coarse round, then full ones."""
    loads = [load for load in _LOADS if load <= max_num_running]
    coarse = sorted({rows[0], rows[len(rows) // 2], rows[-1]})
    for round_index in range(_ROUNDS):
        for load in loads:
            counts = rows if round_index else coarse
            yield load, [n for n in counts if n == 1 or load * n <= max_step_rows]


def _interpolated(
    medians: dict[tuple[int, int], float], load: int, rows: list[int]
) -> list[float]:
    """Seconds by rows; beyond what was measured, in proportion to the rows."""
    measured = [count for count in rows if (load, count) in medians]
    seconds = [medians[load, count] for count in measured]
    return [
        float(np.interp(count, measured, seconds))
        if count <= measured[-1]
        else seconds[-1] * count / measured[-1]
        for count in rows
    ]


def _agreed(answer: bool) -> bool:
    """Rank 0's answer: all ranks run the same steps, or they wait for each other."""
    group = get_tp_group()
    return answer if group.world_size == 1 else group.broadcast_object(answer, src=0)


def tree_of_rows(rows: int, num_prompt_tokens: int, num_ept: int) -> SparseTree:
    """A tree of `rows` rows: about a third prompt rows, the rest a binary tree."""
    prompt_tokens = min((rows - 1) // (2 + num_ept), 4 * num_prompt_tokens)
    nodes = rows - prompt_tokens * num_ept
    parents = [child // 2 for child in range(nodes - 1)]
    ranks = [child % 2 for child in range(nodes - 1)]
    prompts = [0] * nodes
    for index in range(prompt_tokens):
        prompts[index % nodes] += 1
    return SparseTree(tuple(parents), tuple(ranks), tuple(prompts), num_ept)


def blocks_of(config: Any, index: int, tokens: int) -> tuple[list[int], ...]:
    """Blocks of a made-up request in each KV cache group; 0 is vLLM's null block.

    Args:
        config: vLLM's KVCacheConfig.
        index: of the request.
        tokens: most that it will have.
    """
    blocks = []
    for group in config.kv_cache_groups:
        count = -(-tokens // group.kv_cache_spec.block_size)
        # With too little cache requests share blocks: what they read is made up
        # anyway, and it takes as long.
        first = index * count
        free = config.num_blocks - 1
        blocks.append([1 + (first + i) % free for i in range(count)])
    return tuple(blocks)


def scheduled(
    new: list[NewRequestData] | None = None,
    cached: CachedRequestData | None = None,
    tokens: dict[str, int] | None = None,
    drafts: dict[str, list[int]] | None = None,
    finished: set[str] | None = None,
    next_drafts: int = 0,
) -> SchedulerOutput:
    """A scheduler's output: new requests, running ones, and how many tokens of each.

    next_drafts: rows besides the root of the next step.
    """
    tokens = tokens or {}
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = new or []
    if cached is not None:
        output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = tokens
    output.total_num_scheduled_tokens = sum(tokens.values())
    output.scheduled_spec_decode_tokens = drafts or {}
    output.finished_req_ids = finished or set()
    output.num_spec_tokens_to_schedule = next_drafts
    return output


def profile_key(
    args: Any, model: Any, parallel: Any, device: str, on_v2: bool = False
) -> dict[str, Any]:
    """Everything that changes how long a step takes, as JSON values.

    Args:
        args: vLLM's EngineArgs.
        model: the target's ModelConfig.
        parallel: the target's ParallelConfig.
        device: "cpu" or "cuda".
        on_v2: whether vLLM's V2 runner will be used.
    """
    text = model.hf_text_config
    return {
        "runner": "V2" if on_v2 else "V1",
        "model": model.model,
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": model.get_hidden_size(),
        "vocab_size": text.vocab_size,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_cache_dtype": str(args.kv_cache_dtype),
        "device": _device_name(device),
        "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "omp_threads": os.environ.get("OMP_NUM_THREADS", "auto"),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "eager": bool(model.enforce_eager),
        "attention_backend": str(args.attention_backend),
        "vllm": vllm.__version__,
        "vllm_ppd": vllm_ppd.__version__,
        # A plain string: vLLM's messages between processes take no other kind.
        "torch": str(torch.__version__),
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        return current_platform.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    name = line.split(":", 1)[1].strip()
                    break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def known_profile(choice: str, key: dict[str, Any]) -> LatencyProfile | None:
    """The profile on file; None where there is none.

    Args:
        choice: "auto", "none" or a file's path.
        key: of `profile_key`.

    Raises:
        FormatError, MeasurementError: a file named by the user that cannot be used.
    """
    if choice == "none":
        return None
    if choice != "auto":
        return LatencyProfile.load(choice, key)
    path = cache_file(key)
    if not path.exists():
        return None
    try:
        return LatencyProfile.load(path, key)
    except (FormatError, MeasurementError) as error:
        logger.warning("ignoring a latency profile and measuring again: %s", error)
        return None
