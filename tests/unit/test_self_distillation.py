"""Text that the model writes itself: what it is, and that it is written once."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from vllm_ppd.cli import main
from vllm_ppd.train import self_distillation
from vllm_ppd.train.continuation import end_tokens
from vllm_ppd.train.data import read_stream
from vllm_ppd.train.job import TrainJob
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.self_distillation import SelfDistillation
from vllm_ppd.train.settings import (
    Distillation,
    TrainingError,
    TrainSettings,
)
from vllm_ppd.train.trainer import Interrupted

LENGTH, PROMPT = 24, 8
GREEDY = Distillation(
    continuations=10, prompt_length=PROMPT, temperature=0.0, batch_size=4
)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.8)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> FrozenModel:
    return FrozenModel.load(model_folder)


@pytest.fixture
def writing(model: FrozenModel, data: Path, tokenizer, tmp_path) -> SelfDistillation:
    return SelfDistillation(
        model=model,
        prompts=read_stream([data], tokenizer, max_tokens=9999, least_tokens=1),
        settings=SAMPLED,
        length=LENGTH,
        seed=0,
        folder=tmp_path / "data",
        run_id={"base_model": "tiny"},
    )


def sequences(text) -> list[tuple[list[int], list[int]]]:
    """(prompt, continuation) pairs, told apart by where insertions are allowed."""
    pairs: list[tuple[list[int], list[int]]] = []
    before = True
    for token, allowed in zip(text.tokens.tolist(), text.allowed.tolist(), strict=True):
        if before and not allowed:
            pairs.append(([], []))
        pairs[-1][1 if allowed else 0].append(token)
        before = allowed
    return pairs


def test_greedy_text_is_what_generate_writes(writing: SelfDistillation) -> None:
    text = dataclasses.replace(writing, settings=GREEDY).stream()
    pairs = sequences(text)
    assert len(pairs) == 10
    prompts = {tuple(prompt) for prompt, _ in pairs}
    assert len(prompts) == 10
    everything = writing.prompts.tokens.tolist()
    for prompt, continuation in pairs:
        assert len(prompt) == PROMPT
        assert any(everything[i : i + PROMPT] == prompt for i in range(len(everything)))
        expected = writing.model.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            do_sample=False,
            max_new_tokens=LENGTH - PROMPT,
            eos_token_id=end_tokens(writing.model),
            pad_token_id=0,
        )[0, PROMPT:]
        assert continuation == expected.tolist()


def test_sampling_is_seeded(writing: SelfDistillation, tmp_path: Path) -> None:
    def tokens(folder: str, **changes) -> torch.Tensor:
        changed = dataclasses.replace(writing, folder=tmp_path / folder, **changes)
        return changed.stream().tokens

    assert torch.equal(tokens("a"), tokens("b"))
    assert not torch.equal(tokens("a"), tokens("a", seed=1))
    assert not torch.equal(tokens("a"), tokens("a", settings=GREEDY))
    assert len(os.listdir(tmp_path / "a")) == 3


def test_more_texts_than_prompts(writing: SelfDistillation) -> None:
    many = dataclasses.replace(
        SAMPLED, continuations=200, prompt_length=20, batch_size=50
    )
    text = dataclasses.replace(writing, settings=many).stream()
    pairs = sequences(text)
    assert len(pairs) == 200
    assert len({tuple(prompt) for prompt, _ in pairs}) < 170
    # Another text from the same prompt, not the same one.
    assert len({tuple(p + c) for p, c in pairs}) > 180
    greedy = dataclasses.replace(many, temperature=0.0)
    with pytest.raises(TrainingError, match="one way only; expected at least 200"):
        dataclasses.replace(writing, settings=greedy).stream()


def test_it_is_written_once(writing: SelfDistillation, monkeypatch) -> None:
    text = writing.stream()

    def never(*_):
        raise AssertionError("written again")

    monkeypatch.setattr(self_distillation, "continue_prompts", never)
    again = writing.stream()
    assert torch.equal(again.tokens, text.tokens)
    assert torch.equal(again.allowed, text.allowed)


@pytest.mark.parametrize("cut", [0, 25])
def test_a_stopped_writing_goes_on(writing, monkeypatch, tmp_path, cut) -> None:
    """After whole batches, or in the middle of a line that a kill cut short."""
    whole = dataclasses.replace(writing, folder=tmp_path / "whole").stream()
    original, calls = self_distillation.continue_prompts, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(self_distillation, "continue_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        writing.stream()
    lines = writing.file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3  # a header and two batches
    if cut:
        writing.file.write_bytes(writing.file.read_bytes()[:-cut])
    resumed = writing.stream()
    assert len(calls) == 3 + (2 if cut else 1)
    assert torch.equal(resumed.tokens, whole.tokens)
    assert writing.file.read_bytes() == (
        (tmp_path / "whole" / writing.file.name).read_bytes()
    )


def test_processes_write_the_same_text_between_them(writing, tmp_path) -> None:
    alone = dataclasses.replace(writing, folder=tmp_path / "alone").stream()
    parts = [
        dataclasses.replace(writing, process=i, processes=2, quiet=True)
        for i in range(2)
    ]
    own = [list(part._own_batches()) for part in parts]
    assert [len(batches) for batches in own] == [2, 1]
    together = parts[0].stream(lambda mine: mine + own[1])
    assert torch.equal(together.tokens, alone.tokens)
    assert len(os.listdir(writing.folder)) == 2


def test_damaged_and_foreign_files(writing: SelfDistillation) -> None:
    writing.stream()
    content = writing.file.read_bytes()
    lines = content.splitlines(keepends=True)
    writing.file.write_bytes(b"".join([lines[0], b"[[1, 2\n", *lines[1:]]))
    with pytest.raises(TrainingError, match="line 2 is damaged"):
        writing.stream()
    header = json.loads(lines[0])
    header["run"]["base_model"] = "another"
    writing.file.write_bytes(json.dumps(header).encode() + b"\n")
    with pytest.raises(TrainingError, match="not the text that this run would write"):
        writing.stream()


def test_a_full_disk(writing: SelfDistillation, monkeypatch) -> None:
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        self_distillation, "open", lambda *a: Full(real(*a)), raising=False
    )
    with pytest.raises(TrainingError, match="No space left"):
        writing.stream()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"continuations": 0}, "continuations of the self-distillation is 0"),
        ({"prompt_length": 1.5}, "prompt_length"),
        ({"temperature": -1.0}, "temperature of the self-distillation is -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings(changes: dict, word: str) -> None:
    with pytest.raises(TrainingError, match=word):
        dataclasses.replace(GREEDY, **changes)


def test_prompts_must_leave_room() -> None:
    fits = Distillation(continuations=1, prompt_length=20)
    TrainSettings(steps=1, length=24, distillation=fits)
    with pytest.raises(TrainingError, match="expected at most 20"):
        TrainSettings(
            steps=1,
            length=24,
            distillation=dataclasses.replace(fits, prompt_length=21),
        )


@pytest.fixture
def distilling(job: TrainJob) -> TrainJob:
    settings = dataclasses.replace(job.settings, distillation=SAMPLED)
    return dataclasses.replace(job, settings=settings)


def test_a_run_trains_on_it(distilling: TrainJob) -> None:
    result = distilling.run()
    assert [r["step"] for r in result.history] == [0, 4, 8]
    record = json.loads((Path(distilling.out) / "training.json").read_text())
    assert record["settings"]["distillation"]["continuations"] == 10
    (file,) = (Path(distilling.out) / "data").iterdir()
    assert file.name.startswith("self-distilled-")
    batches = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    written = [ids for batch in batches for ids in batch]
    assert len(written) == 10
    # One window at the end is the held-out text.
    assert record["train_tokens"] == sum(map(len, written)) - LENGTH


def test_ctrl_c_keeps_what_is_written(distilling: TrainJob, monkeypatch, capsys):
    original, calls = self_distillation.continue_prompts, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(self_distillation, "continue_prompts", stopped)
        with pytest.raises(Interrupted, match=r"stays in .*self-distilled"):
            distilling.run()
    whole = dataclasses.replace(distilling, out=distilling.out + "-2").run()
    resumed = dataclasses.replace(distilling, resume=True).run()
    assert torch.equal(resumed.table, whole.table)


def test_too_little_text(distilling: TrainJob) -> None:
    few = dataclasses.replace(SAMPLED, continuations=1)
    settings = dataclasses.replace(distilling.settings, distillation=few)
    with pytest.raises(TrainingError, match="the model wrote 24 tokens"):
        dataclasses.replace(distilling, settings=settings).run()


def test_command(job: TrainJob, capsys) -> None:
    flags = f"train --model {job.model} --data {job.data[0]} --out {job.out} --cpu"
    sizes = "--steps 2 --length 24 --batch-size 2 --points 4 --quiet"
    distill = "--self-distill 6 --self-distill-prompt 8 --self-distill-temperature 0.5"
    assert main.main([*flags.split(), *sizes.split(), *distill.split()]) == 0
    record = json.loads((Path(job.out) / "training.json").read_text())
    assert record["settings"]["distillation"] == {
        "continuations": 6,
        "prompt_length": 8,
        "temperature": 0.5,
        "batch_size": 32,
    }
    flags = flags.replace(job.out, job.out + "-2")
    assert main.main([*flags.split(), *sizes.split(), "--self-distill", "0"]) == 2
    assert "continuations" in capsys.readouterr().err
