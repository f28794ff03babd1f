"""``vllm-ppd demo`` as it runs without a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("vllm-ppd"))


def test_demo_runs_and_shows_equal_output():
    done = subprocess.run(
        [
            *(COMMAND, "demo", "--num-prompts", "1", "--max-tokens", "48"),
            *("--dtype", "float32"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for word in ("tokens/s", "steps", "identical"):
        assert word in done.stdout.lower()
