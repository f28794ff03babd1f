"""A real vLLM engine in a process of its own, driven step by step by the tests.

Tests compare two of them, plain and PPD. An engine is kept until another
configuration is asked for, because starting one takes seconds. Only the engine side
of this file imports vLLM.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch

from vllm_ppd.cli import engines

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()

# One process: the tests look into the model runner, and steps are countable.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The model is tiny: a second thread would mostly wait for the first.
    "OMP_NUM_THREADS": "1",
    # Where vLLM has float32 attended to by Triton, it would multiply in TF32.
    "TRITON_F32_DEFAULT": "ieee",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Several engines hold memory at once; a fixed cache needs no look at what is free.
GPU_MEMORY = (
    {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.1} if ON_GPU else {}
)


class FarEngine:
    """The engine side: keeps the LLM that was asked for last."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.engine, self.llm = settings, None
        if settings["ray"]:
            import ray

            parts = {"num_gpus": 2, "num_cpus": 2, "include_dashboard": False}
            ray.init(log_to_driver=False, **parts)

    def run(self, function: str, engine: dict[str, Any], arguments: Any) -> Any:
        """Whether it went well, and the result, or else what was raised."""
        from vllm import LLM

        try:
            if self.llm is None or self.engine != engine:
                if self.llm is not None:
                    self.llm.llm_engine.engine_core.shutdown()
                self.llm = None
                gc.collect()
                self.engine, self.llm = engine, LLM(**engine)
                draft_as_much_as_possible(self.llm)
            if "params" in arguments:
                arguments["params"] = _sampling_params(arguments["params"])
            module, _, name = function.rpartition(":")
            place = f"tests.engine.{module or 'engine_process'}:{name}"
            return True, resolve_name(place)(self.llm, **arguments)
        except Exception as error:
            text = "".join(traceback.format_exception(error)[-3:])
            return False, f"{type(error).__name__}: {error}\n{text}"


class EngineProcess(engines.EngineProcess):
    """Runs functions of these tests against engines in a process of its own.

    Its log lies in `folder`; perhaps it finds a Ray cluster of two imaginary GPUs. The
    rest is its environment and, for subclasses, the engine side and its settings, and
    where the process finds more modules.
    """

    def __init__(
        self,
        folder: Path,
        far_engine: type[FarEngine] = FarEngine,
        settings: Any = (),
        paths: Sequence[Path] = (),
        ray: bool = False,
        **more: str,
    ) -> None:
        # vLLM finds a platform there whose workers Ray can start.
        stub = [ROOT / "tests" / "ray_cpu_stub"] * ray
        found = [ROOT, *stub, *paths, os.environ.get("PYTHONPATH")]
        python_path = os.pathsep.join(str(path) for path in found if path)
        environment = {**ENVIRONMENT, "PYTHONPATH": python_path, **more}
        settings = {"ray": ray, **dict(settings)}
        super().__init__("engine", settings, folder, far_engine, environment)
        self._read = 0

    def call(self, function: str, engine: dict[str, Any], **arguments: Any) -> Any:
        """Run ``function(llm, **arguments)`` on an LLM(**engine); the function is of
        this module, or "module:function" below tests.engine."""
        ok, result = super().call("run", function, engine, arguments)
        if not ok:
            raise engines.EngineFailedError(result)
        return result

    def generate(
        self, engine: dict[str, Any], prompts: list[Any], params: Any
    ) -> list[dict[str, Any]]:
        return self.call("generate", engine, prompts=prompts, params=params)

    def accepted(self, engine: dict[str, Any]) -> int:
        """Draft tokens that were accepted so far, by vLLM's count."""
        return self.call("spec_counters", engine)["num_accepted_tokens"]

    def preemptions(self, engine: dict[str, Any]) -> float:
        """How often the scheduler threw a running request out."""
        (count,) = self.call("metrics", engine, prefix="vllm:num_preemptions").values()
        return count

    def said(self) -> str:
        """What the process has printed since this was last asked."""
        text = self.log.read_text()[self._read :]
        self._read += len(text)
        return text


# What follows runs in the engine's process.


def draft_as_much_as_possible(llm: Any) -> None:
    """Decode every load with the menu's largest entry: without a profile an engine
    starts plainly, and a busy machine may find that drafting does not pay."""
    if controller_of(llm) is not None:
        hold(llm, draft_lengths(llm)[-1])


def draft_lengths(llm: Any) -> list[int]:
    """Of the menu that is served."""
    from vllm_ppd.engine.settings import serving_settings

    settings = serving_settings(llm.llm_engine.vllm_config)
    return list(settings.tree_menu().draft_lengths)


def controller_of(llm: Any) -> Any:
    """PPD's controller; None in a plain engine."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    observer = scheduler.ppd_observer
    return None if observer is None else observer.controller


def hold(llm: Any, draft_length: int) -> None:
    """Decode every load with this draft length from now on."""
    controller_of(llm).hold(draft_length)


def _sampling_params(params: Any) -> Any:
    from vllm import SamplingParams

    if isinstance(params, list):
        return [SamplingParams(**p) for p in params]
    return SamplingParams(**params)


def _plain_logprobs(entries: Any) -> Any:
    if entries is None:
        return None
    return [
        None if e is None else {t: (lp.logprob, lp.rank) for t, lp in e.items()}
        for e in entries
    ]


def _result(output: Any) -> dict[str, Any]:
    return {
        "ids": [list(o.token_ids) for o in output.outputs],
        "text": [o.text for o in output.outputs],
        "finish": [o.finish_reason for o in output.outputs],
        "stop": [o.stop_reason for o in output.outputs],
        "logprobs": [_plain_logprobs(o.logprobs) for o in output.outputs],
        "prompt_logprobs": _plain_logprobs(output.prompt_logprobs),
    }


def generate(llm: Any, prompts: list[Any], params: Any) -> list[dict[str, Any]]:
    """Generate for all prompts at once; token ids, text, reasons, logprobs."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [_result(output) for output in outputs]


def spec_counters(llm: Any) -> dict[str, int]:
    """vLLM's own speculation counters."""
    prefix = "vllm:spec_decode_"
    found = metrics(llm, prefix)
    return {name.removeprefix(prefix): int(value) for name, value in found.items()}


def metrics(llm: Any, prefix: str) -> dict[str, float]:
    """Sums of the counters and gauges whose names begin so, over their labels."""
    sums: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(prefix) and hasattr(metric, "value"):
            sums[metric.name] = sums.get(metric.name, 0.0) + metric.value
    return sums


def abort_midway(
    llm: Any, prompts: list[Any], params: Any, abort: list[int], after_steps: int
) -> dict[int, dict[str, Any]]:
    """Abort some requests after some steps; return the outputs of the others."""
    engine = llm.llm_engine
    for index, prompt in enumerate(prompts):
        engine.add_request(f"abort-{index}", prompt, params)
    finished: dict[int, dict[str, Any]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        if steps == after_steps:
            engine.abort_request([f"abort-{index}" for index in abort])
        for output in engine.step():
            if output.finished:
                index = int(output.request_id.split("-")[1])
                finished[index] = _result(output)
        steps += 1
    return finished


def _steps(llm: Any, prompt: Any, params: Any) -> Iterator[Any]:
    """One request's outputs, step by step; what is left of it is aborted."""
    engine = llm.llm_engine
    engine.add_request("only", prompt, params)
    try:
        while engine.has_unfinished_requests():
            yield from engine.step()
    finally:
        engine.abort_request(["only"])
        while engine.has_unfinished_requests():
            engine.step()


def kv_of_context(llm: Any, prompt: Any, params: Any, tokens: int) -> dict[str, Any]:
    """Decode until ``tokens`` are out, then read the request's KV from the cache.

    Returns the token ids so far and, per layer, keys and values of every position
    that counts as computed: [kv_heads, positions, head size].
    """
    from vllm_ppd.kernels.cpu.layout import key_view, value_view

    runner = worker_of(llm).model_runner
    batch = runner.input_batch
    for output in _steps(llm, prompt, params):
        ids = list(output.outputs[0].token_ids)
        if len(ids) < tokens:
            continue
        # The last emitted token's own KV is written by the next step.
        positions = len(output.prompt_token_ids) + len(ids) - 1
        index = batch.req_id_to_index[batch.req_ids[0]]
        blocks = batch.block_table[0].block_table.np[index]
        layers = []
        for cache in runner.kv_caches:
            used = blocks[: -(-positions // cache.shape[2])].tolist()
            views = [key_view(cache)[used], value_view(cache)[used]]
            rows = [v.transpose(0, 1).flatten(1, 2)[:, :positions] for v in views]
            layers.append([row.float().numpy() for row in rows])
        return {"ids": ids, "layers": layers}
    raise AssertionError(f"the request ended before {tokens} tokens")


def stream_sessions(
    llm: Any, sessions: list[list[list[int]]], params: Any
) -> dict[str, list[int]]:
    """Tokens of sessions whose input comes in chunks, each answered before the next."""
    engine = llm.llm_engine
    core = engine.engine_core
    for index, chunks in enumerate(sessions):
        for chunk in (*chunks, None):
            request = engine.input_processor.process_inputs(
                f"session-{index}",
                {"prompt_token_ids": chunk or [0]},
                params,
                supported_tasks=("generate",),
                resumable=chunk is not None,
            )
            core.add_request(request)
    tokens: dict[str, list[int]] = {}
    while core.engine_core.scheduler.requests:
        for output in core.get_output().outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


def keep_stock_backend(llm: Any) -> None:
    """Let PPD's later engines have what vLLM chose for an engine without PPD."""
    import vllm.v1.attention.selector as selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_ppd.engine import workers

    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()
    workers.register_tree_backend = lambda replaced, path: None


def spoil_trees(llm: Any, what: str = "") -> None:
    """Let PPD's later engines, on this one's runner, see a wrong row, move no KV or
    build stock metadata; or else mend them."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from vllm_ppd.engine.attention import PPDCPUAttentionBackend
    from vllm_ppd.kernels.tree_attention import TreeBatch

    on_v2 = hasattr(worker_of(llm).model_runner, "req_states")
    place = f"vllm_ppd.engine.{'v2' if on_v2 else 'v1'}"
    mover = f"{place}.kv_move.{'PathMover' if on_v2 else 'KVMover'}"

    def sees_a_sibling(*, ancestors: torch.Tensor, **more: Any) -> Any:
        ancestors = ancestors.clone()
        ancestors[3:4, 0] |= 1 << 2
        return TreeBatch(ancestors=ancestors, **more)

    builder, stock = "get_builder_cls", CPUAttentionBackend.get_builder_cls
    patches = {
        "masks": mock.patch(f"{place}.step_trees.TreeBatch", sees_a_sibling),
        "moves": mock.patch(f"{mover}.move"),
        "metadata": mock.patch.object(PPDCPUAttentionBackend, builder, stock),
    }
    mock.patch.stopall()
    if what:
        patches[what].start()


def traces(llm: Any) -> dict[str, float]:
    """What an engine that has served nothing holds and has counted."""
    runner = worker_of(llm).model_runner
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    states = getattr(runner, "req_states", None)
    held = runner.requests if states is None else states.req_id_to_index
    return metrics(llm, "vllm:ppd_") | {
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "requests": len(held) + len(getattr(runner, "ppd_trees", ())),
        "hooks": "compute_logits" in vars(runner.model),
    }


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


def report(llm: Any) -> dict[str, Any]:
    """What PPD's trees do now."""
    return worker_of(llm).ppd_report()


def draft_within(llm: Any, max_step_rows: int) -> None:
    """Decode each load with the longest drafts of at most so many rows in all."""
    lengths = [0, *draft_lengths(llm)]
    schedule = controller_of(llm).schedule
    for load in range(1, len(schedule)):
        fitting = [k for k in lengths if load * (k + 1) <= max_step_rows]
        schedule[load] = max(fitting, default=0)


def fresh_controller(llm: Any) -> None:
    """A controller that has seen nothing, in the place of one that is held."""
    from vllm_ppd.engine.scheduling import attach_controller

    attach_controller(llm.llm_engine.engine_core.engine_core.scheduler)


def first_schedule(llm: Any) -> list[int]:
    """The draft lengths that the engine starts with, by number of running requests."""
    fresh_controller(llm)
    return list(controller_of(llm).schedule[1:])


def controller_snapshot(llm: Any) -> dict[str, Any]:
    """What the controller has seen."""
    return controller_of(llm).snapshot()


def generate_by_turns(
    llm: Any, prompts: list[Any], params: Any, period: int
) -> tuple[list[dict[str, Any]], list[tuple[bool, bool]]]:
    """Generate with the menu's draft lengths and plain steps in turn.

    Also whether each step had drafts, and whether vLLM's runner could know of any.
    """
    runner = worker_of(llm).model_runner
    lengths = [0, *draft_lengths(llm)]
    steps: list[tuple[bool, bool]] = []
    prepare = runner._prepare_inputs

    def noting(scheduler_output: Any, *args: Any) -> Any:
        drafted = bool(scheduler_output.scheduled_spec_decode_tokens)
        steps.append((drafted, runner.speculative_config is not None))
        turn = len(steps) // period
        hold(llm, 0 if turn % 2 else lengths[turn // 2 % len(lengths)])
        return prepare(scheduler_output, *args)

    runner._prepare_inputs = noting
    try:
        return generate(llm, prompts, params), steps
    finally:
        del runner._prepare_inputs
        draft_as_much_as_possible(llm)


def compilations(llm: Any) -> dict[str, int]:
    """All that vLLM and torch have compiled or loaded as compiled in this process."""
    import dataclasses

    import torch._dynamo.utils
    from vllm.compilation.counter import compilation_counter

    counts = dataclasses.asdict(compilation_counter)
    counts["frames"] = len(torch._dynamo.utils.compilation_time_metrics)
    counts["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {name: int(count) for name, count in counts.items()}


def drafts_of_steps(
    llm: Any, prompt: Any, params: Any, steps: int
) -> list[dict[str, Any]]:
    """One request's token ids, prompt included, and its drafts, after each step."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    found: list[dict[str, Any]] = []
    for output in _steps(llm, prompt, params):
        # The only request, under an id that vLLM made up; none once it is done.
        for request in scheduler.requests.values():
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            found.append({"ids": ids, "drafts": list(request.spec_token_ids)})
        if len(found) == steps:
            break
    return found
