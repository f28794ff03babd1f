"""What every test process needs, whichever tests it runs."""

from __future__ import annotations

import os

# vLLM binds the workers of every engine to the machine's first cores. Where several
# test processes start engines at the same time, the system has to spread them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
