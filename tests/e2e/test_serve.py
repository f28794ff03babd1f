"""``vllm serve`` with PPD, spoken to by the real OpenAI client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.engine.conftest import MODEL, PROMPTS, plain, plain_engine, start_once, texts

__all__ = ["plain", "plain_engine", "start_once", "texts"]

START_SECONDS = 240
# Whether drafting pays on a busy machine is not what these tests are about.
ALWAYS_DRAFTS = {"model": f"ppd:{PROMPTS}", "profile": "none", "online": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL)),
        *("--speculative-config", json.dumps(ALWAYS_DRAFTS)),
        *("--served-model-name", "demo", "--dtype", "float32"),
        *("--max-model-len", "512", "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        _wait(process, port, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(START_SECONDS):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def test_completions_equal_plain_vllms(server, plain, plain_engine, texts):
    prompts = [text[:400] for text in texts[:6]]
    params = {"temperature": 0.0, "max_tokens": 80}
    expected = [r["text"][0] for r in plain.generate(plain_engine, prompts, params)]
    # All at once, as a server meets them.
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(
            lambda p: server.completions.create(model="demo", prompt=p, **params),
            prompts,
        )
    assert [a.choices[0].text for a in answers] == expected
    usage = server.completions.create(model="demo", prompt=prompts[0], **params).usage
    assert usage.completion_tokens <= 80


def test_streams_arrive_in_pieces_and_add_up(server, texts):
    params = {"model": "demo", "prompt": texts[8][:300], "max_tokens": 60}
    whole = server.completions.create(temperature=0.0, **params).choices[0].text
    stream = server.completions.create(temperature=0.0, stream=True, **params)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_seed_stop_and_logprobs(server, texts):
    params = {"model": "demo", "prompt": texts[4][:300], "max_tokens": 40}
    one, two = (
        server.completions.create(temperature=1.0, seed=9, **params).choices[0].text
        for _ in range(2)
    )
    assert one == two
    stopped = server.completions.create(temperature=0.0, stop=["\n"], **params)
    assert "\n" not in stopped.choices[0].text
    scored = server.completions.create(temperature=0.0, logprobs=2, **params)
    logprobs = scored.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 40
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_structured_output_obeys_its_grammar(server, texts):
    answer = server.completions.create(
        model="demo",
        prompt=texts[2][:200],
        max_tokens=20,
        temperature=0.8,
        extra_body={"structured_outputs": {"choice": ["import os", "return None"]}},
    )
    assert answer.choices[0].text in ("import os", "return None")


def test_metrics_count_accepted_draft_tokens(server):
    url = str(server.base_url).replace("/v1/", "/metrics")
    lines = urllib.request.urlopen(url).read().decode().splitlines()
    values = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:spec_decode") and "{" in line
    }
    assert values["vllm:spec_decode_num_drafts_total"] > 50
    assert values["vllm:spec_decode_num_accepted_tokens_total"] > 5
    ours = [line for line in lines if line.startswith("vllm:ppd_")]
    assert any('model_name="demo"' in line for line in ours)
    accepted = [line for line in ours if line.startswith("vllm:ppd_accepted_tokens_")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in accepted) > 0


def test_a_wrong_path_ends_the_server_with_one_sentence():
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL)),
            *("--speculative-model", "ppd:/no/such/folder"),
        ],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode != 0
    assert "there is no folder '/no/such/folder'" in done.stdout + done.stderr
