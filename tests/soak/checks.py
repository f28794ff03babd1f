"""What the soak asks of a server: right answers and counts, level memory, an end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from statistics import median
from typing import Any

import psutil

from benchmarks.results import say
from tests.e2e.server import STOP_SECONDS, Server
from tests.soak.traffic import CLIENTS, Traffic

# Readings of the memory. It grows in the first third, ten minutes of half an hour; a
# shorter time is not judged.
POINTS, MAX_GROWTH, JUDGED_SECONDS = 30, 0.01, 600.0


async def withstand(traffic: Traffic, seconds: float, cell: dict[str, Any]) -> None:
    """Mixed traffic for so many seconds; fills in the cell, whatever happens."""
    memory = cell["memory_mb"] = []
    until = time.monotonic() + seconds
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch(traffic, seconds / POINTS, memory))
            tasks.create_task(traffic.bench(1 + int(seconds / 6), per_second=0.25))
            for index in range(CLIENTS):
                tasks.create_task(traffic.client(index, until))
        # Gauges are those of the last step: let it be this one's.
        await asyncio.sleep(2)
        await traffic.ask(0)
    finally:
        cell |= traffic.seen()
    growth = median(memory[-3:]) / median(memory[9:12]) - 1
    cell |= {"server": traffic.server.metrics(), "memory_growth": round(growth, 5)}
    cell["checks"] |= agreement(traffic.counts, cell["server"])
    cell["checks"]["memory is level"] = growth < MAX_GROWTH or seconds < JUDGED_SECONDS


async def watch(traffic: Traffic, seconds: float, memory: list[float]) -> None:
    """Note the server's resident memory (MB) now and then, and say what went wrong."""
    for _ in range(POINTS):
        await asyncio.sleep(seconds)
        sizes = [process.memory_info().rss for process in traffic.server.processes()]
        memory.append(round(sum(sizes) / 1e6, 1))
        say(f"{memory[-1]} MB, {traffic.lost[:1]}, {traffic.differences[:1]}")


def agreement(clients: Counter[str], server: Counter[str]) -> dict[str, bool]:
    """Whether the counts of clients, vLLM and PPD agree."""
    total = {name.removesuffix("_total"): value for name, value in server.items()}
    ended = total["request_success"] - clients["finished"]
    more = total["generation_tokens"] - clients["tokens"]
    steps, emitted = total["ppd_request_steps"], total["ppd_emitted_tokens"]
    accepted, drafted = total["ppd_accepted_tokens"], total["ppd_draft_tokens"]
    vllm = [total[f"spec_decode_num_{n}_tokens"] for n in ("accepted", "draft")]
    idle = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    return {
        "requests": 0 <= ended <= clients["left"],
        "tokens": 0 <= more <= clients["tokens not seen, at most"],
        "nothing is left running": not any(total[name] for name in idle),
        "emitted tokens": emitted == steps + accepted,
        "draft tokens": 0 < accepted <= drafted <= total["ppd_rows"] - steps,
        "vLLM's draft tokens": 0 < vllm[0] <= vllm[1],
        "prefixes are found": total["prefix_cache_hits"] > 0,
    }


async def killed(server: Server, name: str) -> dict[str, Any]:
    """What becomes of a server and of its requests when one of its processes dies."""
    request = {"model": "demo", "prompt": "def f(", "max_tokens": 480}
    request |= {"temperature": 0.0, "extra_body": {"ignore_eos": True}}
    traffic = Traffic(server, [("long", request)])
    asking = asyncio.gather(*(traffic.ask(0) for _ in range(4)))
    await asyncio.sleep(0.5)
    everything = server.processes()
    [p for p in everything if p.name().startswith(f"VLLM::{name}")][-1].kill()
    await asking
    _, left = await asyncio.to_thread(psutil.wait_procs, everything, STOP_SECONDS)
    return {
        "requests": [each.split(": ")[1].split("(")[0] for each in traffic.lost],
        "exit_status": server.process.poll(),
        "left": [p.name() for p in left if p.status() != psutil.STATUS_ZOMBIE],
    }
