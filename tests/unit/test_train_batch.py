"""Several updates on one pass over a batch."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch

from vllm_ppd.train.data import Batch
from vllm_ppd.train.forward import insertion_loss
from vllm_ppd.train.job import TrainJob
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.trainer import Trainer

STEPS, UPDATES = 7, 3


@pytest.fixture
def several(job: TrainJob) -> TrainJob:
    """Seven steps: two whole batches, and one that ends after its first update."""
    settings = dataclasses.replace(
        job.settings, steps=STEPS, updates=UPDATES, dtype="float32"
    )
    return dataclasses.replace(job, settings=settings)


def trainer_of(job: TrainJob) -> tuple[Any, ...]:
    """The trainer of a job, and the table that it would start from."""
    caught = RuntimeError("caught")
    run = patch.object(Trainer, "run", autospec=True, side_effect=caught)
    with run as called, pytest.raises(RuntimeError, match="caught"):
        job.run()
    return called.call_args.args


def by_hand(
    trainer: Trainer, initial: torch.Tensor, processes: int = 1
) -> torch.Tensor:
    """The same training with a pass of its own for every update; each step's loss is
    the mean over the processes' batches."""
    table, settings = torch.nn.Parameter(initial.clone()), trainer.settings
    assert settings.steps is not None
    optimiser = torch.optim.AdamW([table], weight_decay=0.0)
    for step in range(settings.steps):
        number, update = divmod(step, settings.updates)
        losses = []
        for process in range(processes):
            batch = Batch.draw(trainer.train_stream, settings, number, process)
            loss, _ = insertion_loss(
                trainer.model, table, batch.ids, batch.insertions[update], alpha=0.8
            )
            losses.append(loss)
        progress = step / settings.steps
        rate = settings.learning_rate_at(progress, settings.steps)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        optimiser.step()
    return table.detach()


def test_a_pass_serves_several_updates(several: TrainJob, monkeypatch) -> None:
    """K updates on one pass are K passes with the same insertion points."""
    trainer, initial = trainer_of(several)
    expected = by_hand(trainer, initial)
    assert (expected - initial).abs().max() > 0.01
    rows = FrozenModel.ordinary_rows
    monkeypatch.setattr(Trainer, "_evaluate_if_due", lambda self, progress: False)
    with patch.object(FrozenModel, "ordinary_rows", autospec=True) as counted:
        counted.side_effect = rows
        # Without evaluations there is no result to write, but there is the table.
        found = trainer.run(initial).table
    assert counted.call_count == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", range(2, STEPS))
def test_resume_anywhere_in_a_batch(several: TrainJob, monkeypatch, stop: int) -> None:
    """From checkpoints at its start, after one and after two updates; what came after a
    checkpoint is done a second time."""
    whole = dataclasses.replace(several, out=several.out + "-whole").run().table
    train_step = Trainer._train_step

    def killed(self, *args):
        if self._step == stop:
            raise RuntimeError("killed")
        return train_step(self, *args)

    schedule = dataclasses.replace(several.schedule, checkpoint_every=2)
    several = dataclasses.replace(several, schedule=schedule)
    with pytest.raises(RuntimeError, match="killed"), monkeypatch.context() as context:
        context.setattr(Trainer, "_train_step", killed)
        several.run()
    resumed = dataclasses.replace(several, resume=True).run().table
    assert torch.equal(resumed, whole)


def test_batches_repeat_and_differ(job: TrainJob) -> None:
    trainer, _ = trainer_of(job)

    def draw(number: int, process: int = 0) -> Batch:
        return Batch.draw(trainer.train_stream, trainer.settings, number, process)

    first = draw(3)
    points = [part.points for part in first.insertions]
    assert len(points) == trainer.settings.updates
    assert not torch.equal(points[0], points[1])
    for one, other in zip(first.insertions, draw(3).insertions, strict=True):
        assert torch.equal(one.points, other.points)
    assert torch.equal(first.ids, draw(3).ids)
    assert not torch.equal(first.ids, draw(4).ids)
    assert not torch.equal(first.ids, draw(3, process=1).ids)
