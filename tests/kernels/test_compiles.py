"""Every Triton kernel compiles for real GPUs, of which none need be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.implementations import needs_triton

pytestmark = needs_triton

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that a block may have (CUDA programming guide, table of
# technical specifications per compute capability).
SHARED = {89: 99 * 1024, 90: 227 * 1024}


def test_kernels_compile(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    environment.pop("TRITON_INTERPRET", None)
    program = ROOT / "tests" / "kernels" / "compile_kernels.py"
    result = subprocess.run(
        [sys.executable, program, *map(str, SHARED)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = json.loads(result.stdout.splitlines()[-1])
    assert {report["kernel"] for report in reports} == {
        "attend_kernel",
        "join_splits_kernel",
        "_kv_compact_kernel",
        "_fill_tree_kernel",
        "_match_ngrams_kernel",
        "_place_tree_kernel",
        "_tree_walk_kernel",
    }
    for report in reports:
        assert report["shared"] <= SHARED[report["capability"]], report
        # What does not fit into registers goes through memory.
        assert report["stack"] <= 64, report
        assert not report["undefined"], report
