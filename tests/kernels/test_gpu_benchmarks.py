"""The GPU benchmarks run; where there is no GPU, interpreted and tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_kernels

from tests.kernels.implementations import needs_triton


@needs_triton
def test_kernels(tmp_path: Path, capsys: Any) -> None:
    written = tmp_path / "result.json"
    gpu_kernels.main(["--dry-run", "--out", str(written)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(written.read_text())
    attention, step = document["cells"]
    assert attention["tree_us"]["median"] > 0 and attention["flash_us"]["median"] > 0
    # Of bfloat16 values of order 1.
    assert attention["largest_difference"] < gpu_kernels.TOLERANCE
    names = {"walk", "compact", "walk and compact", "fill", "place"}
    assert step["us"].keys() == names
