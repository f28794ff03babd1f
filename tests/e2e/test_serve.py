"""``vllm serve`` with PPD, spoken to by the real OpenAI client."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.e2e.server import START_SECONDS, VLLM, Server, serving
from tests.engine.conftest import MODEL, PROMPTS, plain, plain_engine, start_once, texts

__all__ = ["plain", "plain_engine", "start_once", "texts"]

# Whether drafting pays on a busy machine is not what these tests are about.
ALWAYS_DRAFTS = {"model": f"ppd:{PROMPTS}", "profile": "none", "online": False}
FLAGS = ["--speculative-config", json.dumps(ALWAYS_DRAFTS)]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), *FLAGS) as server:
        yield server


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


@pytest.fixture
def server(running) -> openai.OpenAI:
    return client_of(running)


@pytest.fixture
def check(plain, plain_engine, texts):
    """Called with a client: its completions are plain vLLM's."""
    prompts = [text[:400] for text in texts[:6]]
    params = {"temperature": 0.0, "max_tokens": 80}

    def complete(client: openai.OpenAI) -> None:
        expected = [r["text"][0] for r in plain.generate(plain_engine, prompts, params)]
        # All at once, as a server meets them.
        with ThreadPoolExecutor(6) as pool:
            answers = pool.map(
                lambda p: client.completions.create(model="demo", prompt=p, **params),
                prompts,
            )
        assert [a.choices[0].text for a in answers] == expected

    return complete


def test_two_data_parallel_engines(check, tmp_path):
    """Those of a dense model share nothing but the server."""
    flags = [*FLAGS, "--data-parallel-size", "2", "--api-server-count", "1"]
    # A machine may have fewer NUMA nodes than engines.
    with serving(tmp_path, *flags, VLLM_CPU_OMP_THREADS_BIND="nobind") as both:
        check(client_of(both))
        text = urllib.request.urlopen(f"{both.url}/metrics").read().decode()
    drafts = r'^vllm:spec_decode_num_drafts_total{engine="(\d)".* (.*)$'
    found = {engine: float(n) for engine, n in re.findall(drafts, text, re.M)}
    assert found.keys() == {"0", "1"} and min(found.values()) > 5


def test_completions_equal_plain_vllms(check, server, texts):
    check(server)
    params = {"prompt": texts[0][:400], "temperature": 0.0, "max_tokens": 80}
    usage = server.completions.create(model="demo", **params).usage
    assert usage.completion_tokens <= 80


def test_structured_output_obeys_its_grammar(server, texts):
    answer = server.completions.create(
        model="demo",
        prompt=texts[2][:200],
        max_tokens=20,
        temperature=0.8,
        extra_body={"structured_outputs": {"choice": ["import os", "return None"]}},
    )
    assert answer.choices[0].text in ("import os", "return None")


def test_metrics_count_accepted_draft_tokens(running):
    values = running.metrics()
    assert values["spec_decode_num_drafts_total"] > 50
    assert values["spec_decode_num_accepted_tokens_total"] > 5
    assert values["ppd_accepted_tokens_total"] > 0
    text = urllib.request.urlopen(f"{running.url}/metrics").read().decode()
    ours = [line for line in text.splitlines() if line.startswith("vllm:ppd_")]
    assert any('model_name="demo"' in line for line in ours)


def test_a_wrong_path_ends_the_server_with_one_sentence():
    done = subprocess.run(
        [
            *(VLLM, "serve", str(MODEL), "--speculative-model", "ppd:/no/such/folder"),
        ],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode != 0
    assert "there is no folder '/no/such/folder'" in done.stdout + done.stderr
