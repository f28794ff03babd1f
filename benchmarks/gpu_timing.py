"""How long kernels take on a GPU; on a CPU, in a dry run, only that they run."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from environment import environment_card

from vllm_ppd.files import write_json


def choose_device(dry_run: bool) -> torch.device:
    """The GPU, or the CPU with Triton's interpreter for a dry run.

    To be called before Triton is imported.

    Raises:
        SystemExit: no GPU, and no dry run asked for.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not dry_run:
        raise SystemExit(
            "no GPU was found, and without one there is nothing to measure: use a "
            "machine with an NVIDIA GPU, or add --dry-run to see that the script runs"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def microseconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int
) -> list[float]:
    """Time per call, one figure per repeat.

    The calls, one per layer, run as one CUDA graph, as in serving: what the host does
    to launch them does not count. Give them caches that together exceed the GPU's own
    cache, or they find in it what a real step has to fetch.
    """
    for call in calls:
        call()  # compiles
    if device.type == "cpu":
        began = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - began) / len(calls) * 1e6] * repeats
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / len(calls))
    return times


def finish(
    kind: str, settings: argparse.Namespace, device: torch.device, **found: Any
) -> None:
    """Write a results document to `settings.out`, if given, and print it last."""
    shown = {
        key: value.stem if isinstance(value, Path) else value
        for key, value in vars(settings).items()
        if key != "out"
    }
    document = {
        "format": kind,
        "environment": environment_card() | gpu_card(device),
        "settings": shown,
        **found,
    }
    if settings.out:
        write_json(settings.out, document)
    print(json.dumps(document))


def gpu_card(device: torch.device) -> dict[str, Any]:
    """Which GPU, and the versions of what runs on it."""
    import triton

    card = {"torch": torch.__version__, "triton": triton.__version__}
    with suppress(PackageNotFoundError):
        card["vllm"] = version("vllm")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card["gpu"] = properties.name
        card["multiprocessors"] = str(properties.multi_processor_count)
    else:
        card["gpu"] = "none: a dry run, its times mean nothing"
    return card
