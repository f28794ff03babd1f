"""What a reader must know of the machine and the software behind a figure."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vllm_ppd

ROOT = Path(__file__).resolve().parent.parent
# Variables that change how fast vLLM or torch run.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_USE_V2_MODEL_RUNNER",
)


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo; ARM gives none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def git_state(folder: Path = ROOT) -> dict[str, Any]:
    """Commit and whether files differ from it; None where git cannot tell."""

    def git(*args: str) -> str | None:
        command = ["git", "-C", str(folder), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
    }


def shown_path(path: str) -> str:
    """A path for publication: relative to the repository, or its last part."""
    full = Path(path).resolve()
    if not full.exists():
        return path  # a hub id
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name


def weight_bytes(model: str) -> int | None:
    """Size of a model folder's safetensors, or None for a hub id."""
    sizes = [file.stat().st_size for file in Path(model).glob("*.safetensors")]
    return sum(sizes) or None


def environment_card(variables: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The machine and this project's version; engines describe themselves.

    variables: the environment of the engines.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return {
        "cpu": cpu_model(cpuinfo.read_text() if cpuinfo.exists() else ""),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "vllm_ppd": vllm_ppd.__version__,
        "git": git_state(),
        "variables": {
            name: variables[name] for name in _VARIABLES if name in variables
        },
    }
