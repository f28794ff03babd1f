"""`vllm-ppd train --self-distill`: answers of a real engine, killed and continued."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.conftest import TEMPLATE

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
COMMAND = (
    f"{sys.executable} -m vllm_ppd train --model model --self-distill prompts.jsonl "
    "--self-distill-tokens 24 --out out --steps 2 --length 24 --dtype float32 --cpu"
).split()


def test_a_killed_run_goes_on_and_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CXX", "none")  # an engine without a compiler starts sooner
    shutil.copytree(ROOT / "demo_model" / "model", "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE)
    prompts = [json.dumps({"prompt": f"number {i}?"}) + "\n" for i in range(400)]
    Path("prompts.jsonl").write_text("".join(prompts))
    files: list[Path] = []
    with subprocess.Popen(COMMAND) as first:
        while not files or not files[0].stat().st_size:
            time.sleep(0.02)
            assert first.poll() is None
            files = list(Path("out").glob("data/answers-*"))
        first.kill()
    content = files[0].read_text()[:-9]
    files[0].write_text(content)
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens/s" in done.stderr and "2 steps in" in done.stdout
    lines = files[0].read_text().splitlines()
    assert len(lines) == 400
    assert content.splitlines()[:-1] == lines[: content.count("\n")]
    prompt, answer = (said["content"] for said in json.loads(lines[7])["messages"])
    assert prompt == "<user>number 7?\n<assistant>" and answer
    assert files[0].name in Path("out/training.json").read_text()
