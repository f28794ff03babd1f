"""Kernels compile: Triton's for real GPUs, of which none need be there, and C++."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.kernels.implementations import needs_triton
from vllm_ppd.kernels.cpu import build
from vllm_ppd.kernels.cpu.build import load_library

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that a block may have (CUDA programming guide, table of
# technical specifications per compute capability).
SHARED = {89: 99 * 1024, 90: 227 * 1024}


@needs_triton
def test_triton_kernels_compile(tmp_path):
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


def test_without_a_compiler_one_warning_and_none(monkeypatch, caplog):
    from torch._inductor.codecache import CppCodeCache

    error = RuntimeError("No working C++ compiler found\nmore lines")
    monkeypatch.setattr(CppCodeCache, "load", Mock(side_effect=error))
    with caplog.at_level(logging.WARNING):
        assert build.load_library.__wrapped__() is None
    (record,) = caplog.records
    assert "No working C++ compiler" in record.message
    assert "\n" not in record.message


def test_one_openmp_runtime():
    if load_library() is None:
        pytest.skip("no C++ compiler")
    with open("/proc/self/maps") as file:
        paths = {line.split()[-1] for line in file if "omp.so" in line}
    assert len({p for p in paths if "libgomp" in p or "libiomp" in p}) <= 1, paths
