"""Training end to end on a tiny model: data in, prompt tokens and a record out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.unit.test_bad_input import COMMANDS, place
from tests.unit.tiny_base import SETTINGS
from vllm_ppd.cli import main
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.data import read_stream
from vllm_ppd.train.documents import find_documents, sha256_of_files
from vllm_ppd.train.forward import evaluate
from vllm_ppd.train.job import TrainJob
from vllm_ppd.train.model import FrozenModel, initial_table
from vllm_ppd.train.settings import TrainingError, TrainSettings
from vllm_ppd.train.trainer import Interrupted, Trainer

__all__ = ["place"]


def changed(job: TrainJob, **settings: Any) -> TrainJob:
    return dataclasses.replace(
        job, settings=dataclasses.replace(job.settings, **settings)
    )


def test_a_run_learns_and_writes(job: TrainJob, data: Path) -> None:
    result = changed(job, steps=40, num_ept=2).run()
    kl = [sum(record["kl"]) for record in result.history]
    assert [record["step"] for record in result.history] == [0, 20, 40]
    assert kl[-1] < 0.9 * kl[0]
    out = Path(job.out)
    assert sorted(os.listdir(out)) == [
        "config.json",
        "prompt_tokens.safetensors",
        "training.json",
    ]
    prompts = PromptTokens.load(out)
    assert torch.equal(prompts.embeddings, result.table)
    assert prompts.embeddings.shape == (3, 2, 32)
    assert prompts.base.name == "tiny"
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 40
    assert record["positions"] == 40 * 2 * 6 * 3
    assert record["trainable_parameters"] == 3 * 2 * 32
    assert list(record["data_sha256"]["train"]) == [data.name]
    assert record["held_out"] == record["history"][-1]
    assert set(record["held_out"]) >= {"model_top1", "model_top10", "true_top1"}
    assert str(data.parent) not in json.dumps(record)


def test_labels_can_be_learnt_too(job: TrainJob) -> None:
    history = changed(job, loss="labels", steps=30).run().history
    assert sum(history[-1]["true_top1"]) > sum(history[0]["true_top1"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_resumed(job: TrainJob, monkeypatch, signum) -> None:
    """test_train_batch.py has killed ones."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    whole = dataclasses.replace(job, out=job.out + "-whole").run().table
    step = Trainer._train_step

    def disturbed(self, *args):
        if self._step == 4:
            os.kill(os.getpid(), signum)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", disturbed)
        with pytest.raises(Interrupted):
            job.run()
    assert os.listdir(job.out) == ["checkpoint.safetensors"]
    with pytest.raises(TrainingError, match="--resume"):
        job.run()
    resumed = dataclasses.replace(job, resume=True).run()
    assert "checkpoint.safetensors" not in os.listdir(job.out)
    assert [record["step"] for record in resumed.history] == [0, 4, 8]
    assert torch.equal(whole, resumed.table)
    after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_seeds_matter_and_repeat(job: TrainJob) -> None:
    tables = []
    for index, seed in enumerate((0, 0, 1)):
        each = dataclasses.replace(job, out=f"{job.out}-{index}")
        tables.append(changed(each, steps=2, seed=seed).run().table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_a_time_budget_ends(job: TrainJob) -> None:
    result = changed(job, steps=None, minutes=0.01).run()
    # A slow machine affords no evaluation between the first and the last.
    steps = [record["step"] for record in result.history]
    assert steps[0] == 0 and steps[-1] == result.steps > 0


@pytest.fixture
def model_and_stream(model_folder: Path, data: Path, tokenizer) -> tuple:
    stream = read_stream([data], tokenizer, max_tokens=500, least_tokens=1)
    return FrozenModel.load(model_folder), stream


def test_init_from_prompt_tokens_of_another_shape(job, model_and_stream) -> None:
    changed(job, steps=1, num_prompt_tokens=2).run()
    old = PromptTokens.load(job.out)
    model, stream = model_and_stream
    grown = initial_table(old, (3, 2), model, stream, seed=0)
    assert torch.equal(grown[:2, :1], old.embeddings)
    assert torch.equal(grown[2, 0], old.embeddings[1, 0])
    assert not torch.equal(grown[:, 1], grown[:, 0])
    for init in ("text", "vocabulary"):
        assert initial_table(init, (3, 2), model, stream, seed=0).shape == (3, 2, 32)


def test_plain_text_and_limits(tmp_path: Path, tokenizer) -> None:
    text = "".join(f"line {i}\n" for i in range(20_000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    documents = find_documents(path)
    assert len(documents) == 4
    assert "".join(document.read() for document in documents) == text
    stream = read_stream([path], tokenizer, max_tokens=1000, least_tokens=1)
    assert stream.tokens.numel() == 1000
    assert stream.allowed is None


def test_chats_allow_the_assistant_only(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}) + "\n\n")
    stream = read_stream([path], tokenizer, max_tokens=1000, least_tokens=1)
    assert stream.allowed is not None
    text = tokenizer.decode(stream.tokens)
    assert text == "<user>hi\n<assistant>yes\n<user>so\n<assistant>no\n"
    allowed = "".join(c for c, a in zip(text, stream.allowed, strict=True) if a)
    assert allowed == "yes\nno\n"


def test_schedules() -> None:
    """Updates follow the length; the learning rate is a cosine, less in short runs."""
    for length, updates in ((8, 1), (256, 8), (1000, 31)):
        assert TrainSettings(steps=1, length=length).updates == updates
    rates = [SETTINGS.learning_rate_at(p, 8) for p in (0.0, 0.5, 1.0, 1.2)]
    assert rates == pytest.approx([0.01, 0.005, 0.0, 0.0])
    settings = dataclasses.replace(SETTINGS, rate_steps=100)
    rates = [settings.learning_rate_at(0.0, steps) for steps in (0, 25, 100, 999)]
    assert rates == pytest.approx([0.0, 0.0025, 0.01, 0.01])


def test_the_default_learning_rate_follows_the_embeddings(job, monkeypatch) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    changed(job, learning_rate=None, steps=2).run()
    recorded = json.loads((Path(job.out) / "training.json").read_text())["settings"]
    # Embeddings were drawn with a standard deviation of 0.2.
    assert recorded["learning_rate"] == pytest.approx(0.4, rel=0.1)
    peak = recorded["learning_rate"] * 2 / recorded["rate_steps"]
    assert rates == pytest.approx([peak, peak / 2])


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    """With a minute of time, and nothing to train."""
    return Trainer(
        model=None, train_stream=None, held_out=None, folder=tmp_path, run_id={},
        settings=dataclasses.replace(SETTINGS, steps=None, minutes=1.0),
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip


def test_a_time_budget_guesses_the_steps_for_the_learning_rate(trainer) -> None:
    trainer._steps_here, trainer._busy, trainer._elapsed = 30, 5.0, 15.0
    assert trainer._progress() == (0.25, 360.0, False)


@pytest.mark.parametrize(
    ("seconds", "due"),
    # Of a minute, evaluations may take six seconds: the first one and so many more.
    [(0.0, 8), (0.6, 8), (1.5, 3), (3.0, 1), (60.0, 1)],
)
def test_evaluations_take_a_tenth_of_a_time_budget(trainer, seconds, due) -> None:
    trainer._history = [{"progress": 0.0}]
    trainer._evaluation_seconds = seconds
    for percent in range(1, 103):
        if trainer._evaluation_due(percent / 100):
            trainer._history.append({"progress": percent / 100})
    assert len(trainer._history) == 1 + due
    assert trainer._history[-1]["progress"] == 1.0


def test_short_evaluations_are_of_the_first_windows(model_and_stream) -> None:
    model, stream = model_and_stream
    table = initial_table("text", (3, 1), model, stream, seed=0)
    short, count = evaluate(model, table, stream, SETTINGS, 20, seconds=0.0)
    assert count == SETTINGS.batch_size
    same, _ = evaluate(model, table, stream, SETTINGS, 20, limit=count)
    assert same.summary() == short.summary()
    whole, count = evaluate(model, table, stream, SETTINGS, 20)
    assert count == 20 and whole.points[0] == 10 * short.points[0]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in "abc":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(folder)
    hashes = sha256_of_files(tmp_path / folder / "text.txt" for folder in "abc")
    assert list(hashes) == ["text.txt", "text.txt (2)", "text.txt (3)"]
    assert len(set(hashes.values())) == 3


def test_command(place, capsys, monkeypatch) -> None:
    command = COMMANDS["train --steps 4"].format_map(place).split()
    assert main.main(command) == 0
    output = capsys.readouterr().out
    assert "4 steps" in output
    assert "the model's argmax" in output

    def stop(self, *args):
        self._stop.set()
        return 0.0, 1, None

    monkeypatch.setattr(Trainer, "_train_step", stop)
    assert main.main([*command, "--overwrite"]) == 130
    assert "continue with --resume" in capsys.readouterr().err
