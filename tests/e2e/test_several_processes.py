"""`accelerate launch` trains in several processes: here two, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from tests.unit import tiny_base
from tests.unit.test_train_batch import by_hand, trainer_of
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.job import TrainJob

pytestmark = pytest.mark.e2e
STEPS, ROOT = 3, Path(__file__).parents[2]
# Three steps end in the middle of the second batch.
SETTINGS = replace(tiny_base.SETTINGS, steps=STEPS, points=4, learning_rate=0.05)
FLAGS = (
    f"--steps {STEPS} --length 24 --batch-size 2 --points 4 --updates 2 "
    "--learning-rate 0.05"
)


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    tiny_base.write_tiny_model(tmp_path / "model")
    tiny_base.write_texts(tmp_path / "text.jsonl")
    launch = (
        # With its own --cpu, accelerate starts one process (more only through MPI).
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --main_process_port 0 "
        "-m vllm_ppd.cli.train --model model --data text.jsonl --out out --cpu --quiet"
    )
    done = subprocess.run(
        [sys.executable, *launch.split(), *FLAGS.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # One report, although there are two processes.
    assert done.stdout.count("3 steps in") == 1
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["processes"] == 2
    assert record["positions"] == 2 * STEPS * 2 * 4 * 3

    job = TrainJob(
        model=str(tmp_path / "model"),
        data=[str(tmp_path / "text.jsonl")],
        out=str(tmp_path / "alone"),
        settings=SETTINGS,
        cpu=True,
        quiet=True,
    )
    trainer, initial = trainer_of(job)
    expected = by_hand(trainer, initial, processes=2)
    found = PromptTokens.load(tmp_path / "out").embeddings
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - initial).abs().max() > 0.05
