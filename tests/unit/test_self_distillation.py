"""Answers to train on: which prompts are asked, and what a stopped run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

pytest.importorskip("accelerate")

from vllm_ppd.cli import self_distillation
from vllm_ppd.cli.self_distillation import (
    OWN_PROMPT,
    read_prompts,
    write_answers,
    write_prompts,
)
from vllm_ppd.train.data import read_stream
from vllm_ppd.train.settings import TrainingError


class FakeEngine:
    """Answers with the temperature, until it is stopped after some batches."""

    def __init__(self, batches: int = 9) -> None:
        self.batches, self.calls = batches, []

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        if method != "complete":
            return arguments
        if self.calls.count(method) > self.batches:
            raise KeyboardInterrupt
        return [((9,), f"said at {each['temperature']}<end>") for each in arguments[1]]


@pytest.mark.parametrize("cut", [0, 7])
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch, tokenizer, cut) -> None:
    monkeypatch.setattr(self_distillation, "BATCH", 4)
    prompts = [f"<user>question {i}\n<assistant>" for i in range(10)]
    path, engine = tmp_path / "data" / "answers.jsonl", FakeEngine()
    with pytest.raises(KeyboardInterrupt):
        write_answers(path, prompts, 5, FakeEngine(batches=1))
    content = path.read_bytes()
    assert content.count(b"\n") == 4
    path.write_bytes(content[: len(content) - cut])
    write_answers(path, prompts, 5, engine)
    write_answers(path, prompts, 5, engine)  # nothing is left to do
    assert engine.calls == ["start", *["encode", "complete"] * 2]

    stream = read_stream([path], tokenizer, max_tokens=999, least_tokens=1)
    assert sorted(tokenizer.decode(stream.tokens).split("<user>")[1:]) == [
        f"question {i}\n<assistant>said at {(0.0, 0.7, 1.0)[i % 3]}<end>"
        for i in range(10)
    ]
    with pytest.raises(TrainingError, match=r"cannot be written: .*; use another"):
        write_answers(path / "more.jsonl", prompts, 5, engine)
    # The mark at the end is one token; insertions take place in answers alone.
    assert (stream.tokens == 0).sum() == 10
    answers = tokenizer.decode(stream.tokens[stream.allowed])
    assert answers.count("said at") == 10 and "<" not in answers.replace("<end>", "")


def test_forms_of_prompts(tmp_path: Path, tokenizer) -> None:
    user, said = ({"role": r, "content": "hi"} for r in ("user", "assistant"))
    chat, long = [{"from": "human", "value": "hi"}], {"prompt": "too long" * 9}
    lines: list[Any] = [{"prompt": "hi"}, {"turns": ["hi", "and then?"]}, long]
    lines += [{"messages": [user, said, user]}, {"conversations": chat, "prompt": "a"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(2 * "".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(path, tokenizer, 40) == 8 * ["<user>hi\n<assistant>"]


def test_prompts_that_the_model_writes(tmp_path: Path, monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(self_distillation, "BATCH", 8)
    written = [((1, 2), " why? "), ((1,), "why?"), ((3,) * OWN_PROMPT, "and"), ((), "")]
    written += [((4,), str(i)) for i in range(4)]
    engine, path = Mock(), tmp_path / "prompts.jsonl"
    engine.call.side_effect = lambda method, *_: written
    write_prompts(path, 8, tokenizer, engine)
    assert engine.call.mock_calls[1] == call("encode", ["<user>"], True)
    assert engine.call.mock_calls[2].args[2][0]["stop"] == ["<assistant>"]
    # Ended, not empty, and once in a batch; two batches give enough.
    said = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert said == ["why?", *"0123"] * 2
    written[:] = written[2:3] * 8
    with pytest.raises(TrainingError, match=r"of 8 prompts .* only 0 .* give --self"):
        write_prompts(path, 99, tokenizer, engine)
