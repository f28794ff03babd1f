"""The latency profile that is on file for an engine, and what it is filed under."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform

import vllm_ppd
from vllm_ppd.search.latency import LatencyProfile, MeasurementError, cache_file

__all__ = ["known_profile", "profile_key"]

logger = init_logger("vllm.ppd")


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
        # V1's profiles do not name their runner.
        **({"runner": "V2"} if on_v2 else {}),
        "model": model.model,
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": model.get_hidden_size(),
        "vocab_size": text.vocab_size,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_cache_dtype": str(args.kv_cache_dtype),
        "device": _device_name(device),
        "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "tensor_parallel_size": parallel.tensor_parallel_size,
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
    """The profile to plan by; None where a typical one must do for now.

    Args:
        choice: "auto", "none" or a file's path.
        key: of `profile_key`.

    Raises:
        MeasurementError: a file named by the user that cannot be used here.
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
    except MeasurementError as error:
        logger.warning("ignoring a latency profile and measuring again: %s", error)
        return None
