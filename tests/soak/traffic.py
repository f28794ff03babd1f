"""The soak's traffic: requests of many kinds, clients that send them, what they saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from math import sin
from pathlib import Path
from typing import Any

import openai
from pytest import approx

from tests.e2e.server import VLLM, Server
from tests.engine.conftest import MODEL, mixed
from tests.engine.engine_process import ROOT

LOST_SECONDS = 600.0  # a request that takes longer counts as lost
CLIENTS, WAVE_SECONDS = 12, 25.0
STREAM = {"include_usage": True, "continuous_usage_stats": True}


def all_cases() -> list[tuple[str, dict[str, Any]]]:
    """Kinds and requests; greedy ones are first, those with seeds last."""
    lines = (ROOT / "demo_model" / "held_out.jsonl").read_text().splitlines()
    texts = mixed([json.loads(line)["text"] for line in lines], 200)
    kinds = json.loads(Path(__file__).with_name("requests.json").read_text())
    cases: list[tuple[str, dict[str, Any]]] = []
    for kind, more in kinds.items():
        for number in range(len(cases), len(cases) + more.pop("count")):
            prefix = texts[1][:300] if kind == "prefix" else ""
            ask = {"model": "demo", "prompt": (prefix + texts[number])[:600]}
            ask |= {"temperature": 0.0, "max_tokens": 48 + 16 * (number % 5), **more}
            if kind.startswith("chat"):
                ask["messages"] = [{"role": "user", "content": ask.pop("prompt")}]
            cases.append((kind, ask))
    return cases


@dataclass
class Answer:
    """What has arrived of an answer, by choice."""

    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    tokens: int = 0
    left: bool = False

    def add(self, part: Any) -> None:
        """Add a response, or a piece of one."""
        for choice in part.choices:
            message = getattr(choice, "message", None) or getattr(choice, "delta", None)
            text = message.content if message else choice.text
            self.text[choice.index] = self.text.get(choice.index, "") + (text or "")
            if choice.finish_reason:
                self.finish[choice.index] = choice.finish_reason
            if choice.logprobs:
                self.logprobs += choice.logprobs.token_logprobs
        if part.usage:
            self.tokens = part.usage.completion_tokens

    def agrees(self, expected: Answer) -> bool:
        """Whether it is the expected answer, or the beginning of it."""
        if self.left:
            return all(expected.text[n].startswith(t) for n, t in self.text.items())
        near = self.logprobs == approx(expected.logprobs, abs=1e-3)
        return near and (self.text, self.finish) == (expected.text, expected.finish)


class Traffic:
    """Clients of one server, and what they saw."""

    def __init__(self, server: Server, cases: Any, expected: Any = ()) -> None:
        """Expected are plain vLLM's answers, by the number of the case."""
        self.server, self.cases, self.expected = server, cases, dict(expected)
        self.counts: Counter[str] = Counter()
        self.differences: list[str] = []
        self.lost: list[str] = []
        self._random = random.Random(0)
        how: Any = {"api_key": "-", "max_retries": 0, "timeout": LOST_SECONDS}
        self._client: Any = openai.AsyncOpenAI(base_url=f"{server.url}/v1", **how)

    async def ask(self, number: int, mixed: bool = False) -> Answer:
        """The answer to one case. Mixed clients want some in pieces, and some leave."""
        answer, (kind, request) = Answer(), self.cases[number]
        stream, leaves = (mixed and self._random.random() < p for p in (0.4, 0.2))
        patience = self._random.uniform(0.02, 2) if leaves else LOST_SECONDS
        way = "stream" if stream else "whole"
        client = self._client.chat if "messages" in request else self._client
        if stream:
            request = {**request, "stream": True, "stream_options": STREAM}
        try:
            async with asyncio.timeout(patience):
                given = await client.completions.create(**request)
                if not stream:
                    answer.add(given)
                else:
                    async with given:
                        async for part in given:
                            answer.add(part)
        except (TimeoutError, openai.OpenAIError) as error:
            answer.left = True
            if not (leaves and isinstance(error, TimeoutError)):
                self.lost.append(f"{way}, {kind} {number}: {error!r}"[:300])
        self.note(number, way, answer)
        return answer

    def note(self, number: int, way: str, answer: Answer) -> None:
        """Count a request, and compare its answer where there is only one right one."""
        kind, request = self.cases[number]
        choices, ended = request.get("n", 1), "left" if answer.left else "finished"
        self.counts.update({kind: 1, way: 1, ended: choices, "tokens": answer.tokens})
        # Behind a stop string the server has more tokens than the client.
        if answer.left or "stop" in request:
            most = choices * request["max_tokens"] - answer.tokens
            self.counts["tokens not seen, at most"] += most
        right = self.expected.get(number)
        if right and not right.left:
            self.counts.update({"compared": 1, "compared tokens": answer.tokens})
            if not answer.agrees(right):
                self.differences.append(f"{way}, {number}: {answer}, not {right}")

    def seen(self) -> dict[str, Any]:
        """What the clients saw, for the results."""
        lost, differences = self.lost[:20], self.differences[:20]
        checks = {"every request ended": not lost, "as plain vLLM": not differences}
        found = {"lost": lost, "differences": differences, "checks": checks}
        return {"clients": self.counts, **found}

    async def client(self, index: int, until: float) -> None:
        """One of several mixed clients: ask until the time is up."""
        while (now := time.monotonic()) < until:
            self.server.check()
            # In waves: each number of requests at once has a draft length of its own.
            if index < CLIENTS * sin(now / WAVE_SECONDS) ** 2:
                await self.ask(self._random.randrange(len(self.cases)), mixed=True)
            else:
                await asyncio.sleep(0.5)

    async def bench(self, count: int, per_second: float) -> None:
        """vLLM's own load generator, which sends so many greedy requests."""
        rows, found = map(self.server.log.with_suffix, (".jsonl", ".json"))
        greedy = [request for kind, request in self.cases if kind == "greedy"]
        greedy = [{**each, "output_tokens": each["max_tokens"]} for each in greedy]
        numbers = [number % len(greedy) for number in range(count)]
        rows.write_text("\n".join(json.dumps(greedy[number]) for number in numbers))
        command = (
            f"{VLLM} bench serve --base-url {self.server.url} --model {MODEL} "
            f"--served-model-name demo --dataset-name custom --dataset-path {rows} "
            "--custom-output-len -1 --skip-chat-template --disable-shuffle "
            f"--temperature 0 --num-prompts {count} --request-rate {per_second} "
            f"--disable-tqdm --save-result --save-detailed --result-filename {found}"
        )
        process = await asyncio.create_subprocess_exec(*command.split())
        await process.wait()
        result = json.loads(found.read_text())
        columns = result["generated_texts"], result["output_lens"]
        for number, text, tokens in zip(numbers, *columns, strict=True):
            # It tells no finish reason; after an error the text differs.
            finish = self.expected[number].finish
            self.note(number, "vllm bench", Answer({0: text}, finish, [], tokens))
