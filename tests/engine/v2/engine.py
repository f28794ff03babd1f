"""A vLLM engine on its V2 runner, also without a GPU, driven as in tests/engine.

Without one Triton's interpreter runs the kernels on CPU tensors. It needs Triton, and
a backend for it (tests/triton_cpu_stub), which only the processes started here see.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.engine import engine_process
from tests.engine.engine_process import (
    ENVIRONMENT,
    ON_GPU,
    EngineProcess,
    _sampling_params,
)
from tests.engine.v2.graph_use import graph_use
from tests.engine.v2.host_reads import host_reads, looking_at_every_step

STUB = Path(__file__).parents[2] / "triton_cpu_stub"
RAY_STUB = Path(__file__).parents[2] / "ray_cpu_stub"
HAS_TRITON = find_spec("triton") is not None
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
if not ON_GPU:
    V2["TRITON_INTERPRET"] = "1"


class V2EngineProcess(EngineProcess):
    """An EngineProcess whose engine runs V2.

    Args:
        asynchronous: schedule ahead of the device, as vLLM does on GPUs.
        ray: start a Ray cluster of two imaginary GPUs for vLLM to find.
        more: further environment variables.
    """

    def __init__(
        self, asynchronous: bool = False, ray: bool = False, **more: str
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        environment = {**ENVIRONMENT, **V2, **more}
        if ray:
            # Ray's workers are started anew and find modules by this.
            environment["PYTHONPATH"] = f"{STUB}{os.pathsep}{RAY_STUB}"
            environment["RAY_USAGE_STATS_ENABLED"] = "0"
        saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        self._process = context.Process(
            # No daemon: those may not have workers of their own.
            target=_serve,
            args=(theirs, asynchronous, ray),
            daemon=False,
        )
        self._process.start()
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Any, asynchronous: bool, with_ray: bool) -> None:
    if with_ray:
        # Before vLLM is imported, which then chooses its platform.
        sys.path.insert(0, str(RAY_STUB))
    if not ON_GPU:
        sys.path.insert(0, str(STUB))
        _look_up_builtins_once()
        _sort_for_top_k()
        _store_under_any_mask()
    if with_ray:
        import ray

        ray.init(num_gpus=2, num_cpus=2, include_dashboard=False, log_to_driver=False)
    if asynchronous and not ON_GPU:
        _schedule_ahead()
    for function in OURS:
        setattr(engine_process, function.__name__, function)
    engine_process._serve(pipe)


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
        wanted = vllm_config.scheduler_config.async_scheduling
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def async_scheduling(llm: Any) -> bool:
    """Whether vLLM chose its asynchronous scheduler, and really runs it."""
    core = llm.llm_engine.engine_core.engine_core
    ahead = type(core.scheduler).__name__ == "AsyncScheduler"
    return ahead and core.batch_queue is not None


def num_drafts(llm: Any) -> int:
    return llm.llm_engine.vllm_config.num_speculative_tokens


def first_steps(llm: Any, prompt: Any, params: Any) -> list[dict[str, int]]:
    """For each step of a request: rows of its tree, and the tree's state."""
    runner = _runner(llm)
    trees = runner.speculator.trees
    stock, seen = trees.place, []

    def place(batch: Any) -> None:
        stock(batch)
        if batch.num_draft_tokens:
            rows, tree = int(trees.num_rows[0]), int(trees.trees[0])
            seen.append({"rows": rows, "state": tree - trees.plan.first_trees[0]})
        else:
            seen.append({"rows": 1, "state": -1})

    trees.place = place
    llm.generate([prompt], _sampling_params(params), use_tqdm=False)
    del trees.place
    return seen


def rows_per_step(llm: Any, prompts: Any, params: Any) -> list[tuple[int, int]]:
    """(requests, most rows of one of them) for each step that decodes only."""
    trees = _runner(llm).speculator.trees
    stock, seen = trees.place, []

    def place(batch: Any) -> None:
        stock(batch)
        if not batch.has_prefill:
            seen.append((batch.num_reqs, int(batch.num_scheduled_tokens.max())))

    trees.place = place
    llm.generate(prompts, _sampling_params(params), use_tqdm=False)
    del trees.place
    return seen


def count_every_step(llm: Any, prompts: Any, params: Any) -> dict[str, float]:
    """What requests add to PPD's and vLLM's counts if PPD's miss no step."""
    from vllm_ppd.engine.v2 import counters as step_log

    def counts() -> dict[str, float]:
        return engine_process.metrics(llm, "vllm:ppd_") | {
            f"vllm_{name}": value
            for name, value in engine_process.spec_counters(llm).items()
        }

    usual, step_log.EVERY = step_log.EVERY, 1
    try:
        before = counts()
        llm.generate(prompts, _sampling_params(params), use_tqdm=False)
        return {name: value - before[name] for name, value in counts().items()}
    finally:
        step_log.EVERY = usual


def in_turn(llm: Any, plans: Any, every: int, prompts: Any, params: Any) -> Any:
    """Generate while the trees are exchanged every so many steps."""
    from vllm_ppd.trees.menu import TreePlan

    runner = _runner(llm)
    trees, stock = runner.speculator.trees, runner.sample_tokens
    served, steps = trees.served_plan, 0
    found = [TreePlan.from_dict(plan) for plan in plans]

    def sample_tokens(grammar: Any) -> Any:
        nonlocal steps
        output = stock(grammar)
        steps += 1
        if steps % every == 0:
            trees.set_plan(found[steps // every % len(found)])
        return output

    runner.sample_tokens = sample_tokens
    try:
        return engine_process.generate(llm, prompts, params), steps // every
    finally:
        del runner.sample_tokens
        trees.set_plan(served)


def learn(llm: Any, prompts: Any, params: Any, rounds: int) -> Any:
    """Generate until the traffic has changed the trees, each time the same.

    It begins with trees that guess nothing, than which others are better by any
    evidence.

    Returns what was generated each time, changes, and (observations, tries, moves).
    """
    from vllm_ppd.engine.v2 import online
    from vllm_ppd.trees.menu import Tier, TreePlan
    from vllm_ppd.trees.tree import SparseTree, TreePolicy

    runner, outputs = _runner(llm), []
    trees = runner.speculator.trees
    served = trees.served_plan
    bare = SparseTree((), (), (1,), served.num_ept)
    policy = TreePolicy((bare,) * (served.num_prompt_tokens + 1))
    trees.set_plan(
        TreePlan(
            tuple(
                Tier(tier.max_requests, (policy,) * len(tier.policies))
                for tier in served.tiers
            )
        )
    )
    learning = runner._ppd_online
    usual = online.COUNT_EVERY, online.ASK_EVERY
    online.COUNT_EVERY, online.ASK_EVERY = 2, 4
    learning._pace._enough, learning._pace._rest = 20.0, 0.0
    try:
        while len(outputs) < rounds and not learning.changes:
            outputs.append(engine_process.generate(llm, prompts, params))
            engine_process.await_search(llm)
    finally:
        online.COUNT_EVERY, online.ASK_EVERY = usual
    moves = learning._sums.parts(learning._seen).moves
    return outputs, learning.changes, moves.tolist()


def generate_and_learn(llm: Any, prompts: Any, params: Any) -> list[dict[str, Any]]:
    """Generate while every step is learnt from."""
    with looking_at_every_step():
        return engine_process.generate(llm, prompts, params)


def learns(llm: Any) -> bool:
    return _runner(llm)._ppd_online is not None


def _runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


# Functions that tests may call by name in the engine's process.
OURS = (
    async_scheduling,
    num_drafts,
    first_steps,
    rows_per_step,
    count_every_step,
    host_reads,
    in_turn,
    learn,
    learns,
    generate_and_learn,
    graph_use,
)
