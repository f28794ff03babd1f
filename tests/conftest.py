"""What every test process needs, whichever tests it runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# vLLM binds the workers of every engine to the machine's first cores. Where several
# test processes start engines at the same time, the system has to spread them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture
def only_ray() -> Iterator[None]:
    """No other test's Ray beside this one: they would find each other."""
    from filelock import FileLock

    with FileLock(Path(tempfile.gettempdir()) / "vllm_ppd_tests_ray.lock"):
        yield
