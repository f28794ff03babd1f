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
from typing import Any

import numpy as np
import torch
import vllm
from tqdm import tqdm
from vllm.distributed import get_tp_group, get_world_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

import vllm_ppd
from vllm_ppd.engine.settings import ServingSettings
from vllm_ppd.files import FormatError
from vllm_ppd.search.latency import LatencyProfile, MeasurementError, cache_file

logger = init_logger("vllm.ppd")

# A step with more rows in all is far past where drafting pays.
_MAX_STEP_ROWS = 512
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Loads by how much they tell; each round measures them all.
_LOADS = (1, 4, 16, 2, 8, 64, 32)
_ROUNDS = 3
# Seconds of a step that is measured only once.
_SLOW_STEP = 1.0


class MeasuredRunner:
    """A model runner as `measured_profile` sees it.

    Args:
        runner: with PPD, ready to serve.

    Attributes:
        max_num_running: most requests of a step.
        max_step_rows: most rows of a step.
        row_counts: rows per request that it can run, rising from 1; None for any.
    """

    row_counts: list[int] | None = None

    def __init__(self, runner: Any):
        self._runner = runner
        limits = runner.vllm_config.scheduler_config
        self.max_num_running = limits.max_num_seqs
        self.max_step_rows = limits.max_num_batched_tokens

    def seconds(self, num_running: int, rows: int) -> list[float]:
        """Seconds of some decode steps of so many requests with so many rows each."""
        raise NotImplementedError

    def finish(self) -> None:
        """Serve again what was served before."""


def measured_profile(
    settings: ServingSettings, runner: MeasuredRunner, keep: bool = True
) -> LatencyProfile | None:
    """Measure and keep the profile; None where this start does not have to.

    All ranks take part, and all go by rank 0's decisions and figures. Of data-parallel
    engines that share nothing each measures for itself, and one keeps its profile.

    Args:
        keep: whether this engine writes the file.
    """
    if not _agreed(settings.measure):
        return None
    began = time.monotonic()
    try:
        profile = _measure(settings, runner)
    finally:
        runner.finish()
    profile = LatencyProfile.from_dict(_agreed(profile.to_dict()))
    if keep and get_tp_group().is_first_rank:
        path = cache_file(profile.key)
        try:
            profile.save(path)
            where = f"kept in {path}"
        except OSError as error:
            where = f"it could not be kept: {error}"
        seconds = time.monotonic() - began
        logger.info("PPD measured this machine in %.1f s (%s)", seconds, where)
    return profile


def is_slow(seconds: float) -> bool:
    """Whether a step takes so long that it is measured once; the same on all ranks."""
    return _agreed(seconds > _SLOW_STEP)


def _measure(settings: ServingSettings, runner: MeasuredRunner) -> LatencyProfile:
    max_rows = settings.tree_menu().max_rows
    rows = runner.row_counts or [*(n for n in _ROWS if n < max_rows), max_rows]
    cells = _cells(rows, runner.max_num_running, runner.max_step_rows)
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    deadline = time.monotonic() + settings.measure_seconds
    quiet = not get_tp_group().is_first_rank
    with tqdm(desc="PPD measures this machine", total=len(cells), disable=quiet) as bar:
        for num_running, count in cells:
            # The coarse curve of one request is the least that is of use.
            may_stop = num_running > 1 or (num_running, count) in times
            if may_stop and _agreed(time.monotonic() > deadline):
                break
            times[num_running, count] += runner.seconds(num_running, count)
            bar.update()
        bar.total = bar.n
    medians = {cell: float(np.median(seconds)) for cell, seconds in times.items()}
    return _profile_of(medians, rows, settings.profile_key)


def _cells(
    rows: list[int], max_num_running: int, max_step_rows: int
) -> list[tuple[int, int]]:
    """(load, row count) in the order of measuring: a coarse round, then full ones.

    All row counts of a load are next to each other, and come again in each round: draft
    lengths are chosen by ratios, and a machine's speed drifts.
    """
    max_step_rows = min(max_step_rows, _MAX_STEP_ROWS)
    coarse = sorted({rows[0], rows[len(rows) // 2], rows[-1]})
    return [
        (load, count)
        for counts in (coarse, *[rows] * (_ROUNDS - 1))
        for load in _LOADS
        if load <= max_num_running
        for count in counts
        if count == 1 or load * count <= max_step_rows
    ]


def _profile_of(
    medians: dict[tuple[int, int], float], rows: list[int], key: dict[str, Any]
) -> LatencyProfile:
    """The profile of all loads of which enough was measured before time was up.

    Row counts between measured ones are interpolated; beyond the last one, seconds grow
    in proportion to the rows.
    """
    by_load: dict[int, dict[int, float]] = defaultdict(dict)
    for (load, count), median in sorted(medians.items()):
        by_load[load][count] = median
    # A plain step alone says nothing of what rows cost.
    loads = [load for load, curve in by_load.items() if load == 1 or len(curve) > 1]
    table = []
    for load in loads:
        counts, seconds = list(by_load[load]), list(by_load[load].values())
        beyond = np.maximum(np.array(rows) / counts[-1], 1.0)
        table.append(np.interp(rows, counts, seconds) * beyond)
    return LatencyProfile.smoothed(loads, rows, np.array(table), key)


def _agreed(answer: Any) -> Any:
    """Rank 0's answer: all ranks run the same steps, or they wait for each other.

    Data-parallel ranks that step together are among them.
    """
    group = get_world_group()
    return answer if group.world_size == 1 else group.broadcast_object(answer, src=0)


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
        choice: "auto", "measure", "none" or a file's path.
        key: of `profile_key`.

    Raises:
        FormatError, MeasurementError: a file named by the user that cannot be used.
    """
    if choice in ("measure", "none"):
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
