"""The GPU benchmarks run; where there is no GPU, interpreted and tiny."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.kernels.implementations import DEVICE, needs_triton

pytestmark = needs_triton
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(
    path.name for path in BENCHMARKS.glob("gpu_*.py") if "__main__" in path.read_text()
)


@pytest.fixture
def run(monkeypatch, capsys):
    def start(script, *arguments):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return start


def test_tree_attention(run, tmp_path):
    written = tmp_path / "result.json"
    document = run("gpu_tree_attention.py", "--dry-run", "--out", str(written))
    assert document == json.loads(written.read_text())
    for cell in document["cells"]:
        assert cell["tree_us"]["median"] > 0 and cell["flash_us"]["median"] > 0
        # Of bfloat16 values of order 1.
        assert cell["largest_difference"] < 0.02


def test_verification(run):
    (cell,) = run("gpu_verify.py", "--dry-run")["cells"]
    assert cell["us"].keys() == {
        "walk",
        "compact",
        "walk and compact",
        "guess",
        "place",
    }


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_one_sentence(run, script):
    with pytest.raises(SystemExit, match=r"no GPU was found.*--dry-run"):
        run(script)


def test_tile_sweep(run):
    (cell,) = run("gpu_tile_sweep.py", "--dry-run")["cells"]
    assert len(cell["tree"]) == 3
    assert {one["shape"]["tile"] for one in cell["tree"]} >= {32}
    assert all(one["us"] > 0 for one in cell["tree"])
