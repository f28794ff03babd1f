"""A run with patience stops when it gets no better, and keeps its best table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from vllm_ppd.cli import main
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.job import TrainJob
from vllm_ppd.train.settings import TrainingError
from vllm_ppd.train.trainer import (
    Trainer,
    best_record,
    evaluations_since_best,
    held_out_loss,
)


def history(*losses: float) -> list[dict]:
    return [{"step": 10 * i, "kl": [loss, 1.0]} for i, loss in enumerate(losses)]


def test_loss_is_the_papers() -> None:
    assert held_out_loss({"kl": [3.0, 2.0, 1.0]}, 0.5) == 3.0 + 1.0 + 0.25


def test_waiting_counts_evaluations_after_the_best() -> None:
    assert evaluations_since_best([], 0.8) == 0
    assert evaluations_since_best(history(5.0), 0.8) == 0
    assert evaluations_since_best(history(5.0, 4.0, 4.5, 4.2), 0.8) == 2
    assert best_record(history(5.0, 4.0, 4.5, 4.0), 0.8)["step"] == 10


@pytest.fixture
def patient(job: TrainJob) -> TrainJob:
    """A job whose table only gets worse, evaluated after every second step."""
    settings = dataclasses.replace(
        job.settings, steps=16, learning_rate=1000.0, patience=3
    )
    schedule = dataclasses.replace(job.schedule, evaluations=8)
    return dataclasses.replace(job, settings=settings, schedule=schedule)


def test_a_run_that_gets_worse_stops_and_keeps_the_best(patient: TrainJob) -> None:
    result = patient.run()
    assert result.stopped_early
    assert result.steps == 6
    assert [record["step"] for record in result.history] == [0, 2, 4, 6]
    losses = [held_out_loss(record, 0.8) for record in result.history]
    assert losses[0] < min(losses[1:])
    assert result.held_out == result.history[0]
    record = json.loads((Path(patient.out) / "training.json").read_text())
    assert record["stopped_early"] is True
    assert record["held_out"]["step"] == 0
    # The table before the first step, which is one of ordinary embeddings.
    untrained = dataclasses.replace(
        patient,
        out=patient.out + "-0",
        settings=dataclasses.replace(
            patient.settings, steps=1, learning_rate=1e-30, patience=None
        ),
    )
    assert torch.equal(result.table, untrained.run().table)
    assert torch.equal(PromptTokens.load(patient.out).embeddings, result.table)


def test_a_run_that_gets_better_goes_on_to_its_end(job: TrainJob) -> None:
    settings = dataclasses.replace(job.settings, patience=1, steps=12)
    plain = dataclasses.replace(
        job, settings=dataclasses.replace(settings, patience=None), out=job.out + "-p"
    )
    result, expected = dataclasses.replace(job, settings=settings).run(), plain.run()
    losses = [held_out_loss(record, 0.8) for record in expected.history]
    assert losses == sorted(losses, reverse=True)
    assert not result.stopped_early
    assert result.steps == expected.steps == 12
    assert torch.equal(result.table, expected.table)


def test_the_best_survives_a_kill(patient: TrainJob, monkeypatch) -> None:
    whole = dataclasses.replace(patient, out=patient.out + "-whole").run()
    step = Trainer._train_step

    def die(self, *args):
        if self._step == 5:
            raise RuntimeError("killed")
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Trainer, "_train_step", die)
        patient.run()
    # The checkpoint is of step 3; the best table was seen before it.
    resumed = dataclasses.replace(patient, resume=True).run()
    assert resumed.steps == whole.steps
    assert torch.equal(resumed.table, whole.table)
    assert resumed.held_out["step"] == 0


def test_command_says_which_table_it_kept(patient: TrainJob, capsys) -> None:
    flags = (
        f"train --model {patient.model} --data {patient.data[0]} --out {patient.out}"
    )
    sizes = "--steps 16 --length 24 --batch-size 2 --points 6 --evaluations 8 --cpu"
    more = "--learning-rate 1000 --patience 3 --quiet"
    assert main.main([*flags.split(), *sizes.split(), *more.split()]) == 0
    shown = capsys.readouterr().out
    assert "6 steps" in shown and "stopped early" in shown
    assert "step 0, the best" in shown


@pytest.mark.parametrize("patience", [0, -1, 1.5])
def test_bad_patience(job: TrainJob, patience) -> None:
    with pytest.raises(TrainingError, match="patience is"):
        dataclasses.replace(job.settings, patience=patience)
