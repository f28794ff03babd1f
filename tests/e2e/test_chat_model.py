"""A real chat model, SmolLM2-135M-Instruct: trained for, shown in the demo, served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import smollm2

from tests.e2e.server import serving

pytestmark = pytest.mark.e2e
COMMAND = str(Path(sys.executable).with_name("vllm-ppd"))
ENV = {**os.environ, "CXX": "none"}  # engines without a compiler start sooner
GREEDY: dict[str, Any] = {"temperature": 0.0}
WEATHER = {"type": "function", "function": {"name": "weather"}}
QUESTIONS: dict[str, dict[str, Any]] = {
    "Why is the sky blue?": GREEDY,
    "Count from one to twenty.": GREEDY | {"stream": True},
    "Name three rivers. Name them again.": GREEDY | {"stop": ["2."]},
    "What is a prime number?": GREEDY | {"logprobs": True, "top_logprobs": 2},
    "Write a limerick.": {"temperature": 1.0, "seed": 5, "n": 2},
    "Is it raining in Rome?": GREEDY | {"tools": [WEATHER], "tool_choice": "none"},
}


@pytest.fixture(scope="module")
def model() -> str:
    return str(smollm2.model_folder())


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    more: Any = {"cwd": folder, "env": ENV, "capture_output": True, "timeout": 500}
    done = subprocess.run([COMMAND, *arguments], text=True, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory) -> Path:
    """Prompt tokens, trained on answers to the model's own prompts; once killed."""
    folder = tmp_path_factory.mktemp("train")
    flags = (
        "--self-distill 9 --self-distill-tokens 16 --steps 2 --length 32 --cpu --out"
    )
    command = ["train", "--model", model, *flags.split(), str(folder)]
    files: list[Path] = []
    with subprocess.Popen([COMMAND, *command], env=ENV) as first:
        while not files or not files[0].stat().st_size:
            time.sleep(0.1)
            assert first.poll() is None
            files = list(folder.glob("data/prompts-*"))
        first.kill()
    *whole, last = files[0].read_text().splitlines(keepends=True)
    files[0].write_text("".join(whole) + last[:-9])
    run(folder, *command)
    (answers,) = folder.glob("data/answers-*")
    written = [file.read_text().splitlines(keepends=True) for file in (*files, answers)]
    assert written[0][: len(whole)] == whole and len(written[0]) >= len(written[1]) == 9
    for asked, answered in zip(*written, strict=False):
        prompt, answer = (said["content"] for said in json.loads(answered)["messages"])
        end = f"user\n{json.loads(asked)['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt.endswith(end) and answer
    return folder


def test_demo_answers_with_equal_ids(model: str, tmp_path: Path) -> None:
    flags = ["--prompt", "Hello!", "--max-tokens", "48", "--dtype", "float32"]
    shown = run(tmp_path, "demo", "--model", model, *flags).stdout
    for word in ("tokens/s", "steps", "token ids are identical", "Hello!"):
        assert word in shown


def ask(client: openai.OpenAI, question: str) -> list[tuple[Any, ...]]:
    """Per choice: its text, why it ended, and its tokens where they are asked for."""
    params = QUESTIONS[question]
    messages: Any = [{"role": "user", "content": question}]
    create = partial(client.chat.completions.create, model="demo", max_tokens=64)
    answer = create(messages=messages, **params)
    if "stream" in params:
        pieces = [chunk.choices[0].delta.content for chunk in answer]
        assert len(pieces) > 5
        return [("".join(piece or "" for piece in pieces),)]
    scores = [getattr(choice.logprobs, "content", ()) for choice in answer.choices]
    return [
        (choice.message.content, choice.finish_reason, [t.token for t in tokens])
        for choice, tokens in zip(answer.choices, scores, strict=True)
    ]


def test_chats_equal_plain_vllms(model: str, trained: Path, tmp_path: Path) -> None:
    ppd = {"model": f"ppd:{trained}", "profile": "none", "online": False}
    answers = []
    for flags in ([], ["--speculative-config", json.dumps(ppd)]):
        with serving(tmp_path, *flags, model=model) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
            story: Any = [{"role": "user", "content": "Tell me a long story."}]
            left: Any = {"model": "demo", "messages": story, "stream": True}
            with client.chat.completions.create(**left) as stream:
                next(iter(stream))
            with ThreadPoolExecutor(4) as pool:
                answers.append([*pool.map(partial(ask, client), QUESTIONS)])
            metrics = server.metrics()
    assert answers[0] == answers[1]
    assert metrics["spec_decode_num_accepted_tokens_total"] > 5
