"""A vLLM engine on its V2 runner, also without a GPU, driven as in tests/engine.

Without one Triton's interpreter runs the kernels on CPU tensors. It needs Triton, and
a backend for it (tests/triton_cpu_stub), which only the processes started here see.
"""

from __future__ import annotations

import contextlib
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from tests.engine import engine_process
from tests.engine.engine_process import ON_GPU, ROOT, EngineProcess, FarEngine
from tests.engine.v2.host_reads import learning_from_every_step

STUB = ROOT / "tests" / "triton_cpu_stub"
HAS_TRITON = find_spec("triton") is not None


class V2EngineProcess(EngineProcess):
    """An EngineProcess whose engine runs V2; perhaps it schedules ahead of the device,
    as vLLM does on GPUs."""

    def __init__(self, folder: Path, asynchronous: bool = False, **more: Any) -> None:
        more["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        if not ON_GPU:
            more["TRITON_INTERPRET"] = "1"
        # Triton finds a driver there.
        paths = [STUB] * (not ON_GPU)
        settings = {"asynchronous": asynchronous}
        super().__init__(folder, FarV2Engine, settings, paths, **more)


class FarV2Engine(FarEngine):
    """The engine side: Triton's interpreter and vLLM, changed where they have to be."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        if not ON_GPU:
            _look_up_builtins_once()
            _sort_for_top_k()
            _store_under_any_mask()
        if settings["asynchronous"] and not ON_GPU:
            _schedule_ahead()


def _look_up_builtins_once() -> None:
    """Half of the interpreter's time goes into listing modules at every call."""
    from triton.runtime import interpreter

    members: dict[Any, list[str]] = {}
    listed, is_builtin = inspect.getmembers, interpreter.tl.core.is_builtin

    def patch_builtin(module: Any, builder: Any, scope: Any) -> None:
        if module not in members:
            members[module] = [n for n, m in listed(module) if is_builtin(m)]
        for name in members[module]:
            member = getattr(module, name)
            if is_builtin(member):
                interpreter._patch_attr(module, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _sort_for_top_k() -> None:
    """The interpreter cannot run vLLM's kernel for top-k and top-p; torch can."""
    import vllm.v1.sample.ops.topk_topp_sampler as sampler

    sampler.HAS_TRITON = False


def _store_under_any_mask() -> None:
    """Masks made of integers, as vLLM's kernel for grammars has, are no booleans to
    the interpreter of Triton 3.9."""
    from triton.runtime import interpreter

    stock = interpreter.InterpreterBuilder.create_masked_store

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return stock(self, ptrs, value, mask, *more)

    interpreter.InterpreterBuilder.create_masked_store = store


def _schedule_ahead() -> None:
    """Undo the CPU platform's choice: vLLM's asynchronous scheduler needs no GPU."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def async_scheduling(llm: Any) -> bool:
    """Whether vLLM chose its asynchronous scheduler, and really runs it."""
    core = llm.llm_engine.engine_core.engine_core
    ahead = type(core.scheduler).__name__ == "AsyncScheduler"
    return ahead and core.batch_queue is not None


def generate_and_watch(
    llm: Any,
    prompts: Any,
    params: Any,
    lengths: Any = None,
    period: int = 1,
    by_load: Any = None,
) -> dict[str, Any]:
    """Generate, while the schedule names one draft length after another.

    Args:
        lengths: of the steps in turn; None leaves the schedule alone.
        period: steps between two of them.
        by_load: draft length for 1, 2, ... requests instead.

    Returns:
        "outputs"; "steps", for each step (requests, most rows of one, num_prompted of
        the first one's tree, -1 in a plain step); "calls", how often each function that
        only steps with trees need was called.
    """
    from vllm_ppd.engine.v2 import drafting, sampling, step_trees

    runner = engine_process.worker_of(llm).model_runner
    speculator = runner.speculator
    buffers, num_prompted = speculator.buffers, speculator.requests.num_prompted
    place = buffers.place
    steps: list[tuple[int, int, int]] = []

    def watched_place(batch: Any) -> None:
        place(batch)
        step = step_trees.step_of(batch)
        prompted = -1 if step is None else int(num_prompted[step.tree_ids[0]])
        rows = int(batch.num_scheduled_tokens.max())
        if step is not None:
            rows = int(step.num_rows.max())
        steps.append((batch.num_reqs, rows, prompted))
        if lengths is not None:
            turn = len(steps) // period
            engine_process.hold(llm, lengths[turn % len(lengths)])

    watched = [
        *((step_trees, "place_tree"), (sampling, "tree_walk")),
        *((drafting, "fill_tree"), (drafting, "match_ngrams")),
        *((runner.ppd_mover, "move"), (speculator.requests, "grow")),
    ]
    if by_load is not None:
        engine_process.controller_of(llm).schedule[1:] = by_load
    with contextlib.ExitStack() as stack:
        stack.callback(engine_process.draft_as_much_as_possible, llm)
        stack.enter_context(mock.patch.object(buffers, "place", watched_place))
        mocks = {}
        for owner, name in watched:
            each = mock.patch.object(owner, name, wraps=getattr(owner, name))
            mocks[name] = stack.enter_context(each)
        outputs = engine_process.generate(llm, prompts, params)
    calls = {name: each.call_count for name, each in mocks.items() if each.called}
    return {"outputs": outputs, "steps": steps, "calls": calls}


def count_every_step(llm: Any, prompts: Any, params: Any) -> dict[str, float]:
    """What requests add to PPD's and vLLM's counts if PPD's miss no step."""
    from vllm_ppd.engine import counters

    def counts() -> dict[str, float]:
        return engine_process.metrics(llm, "vllm:ppd_") | {
            f"vllm_{name}": value
            for name, value in engine_process.spec_counters(llm).items()
        }

    usual, counters.EVERY = counters.EVERY, 1
    try:
        first = counts()
        llm.generate(prompts, params, use_tqdm=False)
        return {name: value - first[name] for name, value in counts().items()}
    finally:
        counters.EVERY = usual


def generate_and_learn(llm: Any, prompts: Any, params: Any) -> list[dict[str, Any]]:
    """Generate while every step is learnt from."""
    with learning_from_every_step():
        return engine_process.generate(llm, prompts, params)
