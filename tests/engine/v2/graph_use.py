"""Runs in the engine's process: how steps were run, and what was compiled for them."""

from __future__ import annotations

from collections import Counter
from typing import Any


def graph_use(llm: Any, prompts: Any, params: Any, steps: int) -> dict[str, Any]:
    """Generate until so many steps were run; how, and what was compiled meanwhile.

    Returns "steps", "decoding" and "reading" (steps without and with prompts by CUDA
    graph mode), and "compiled" (kernels and graphs that are new).
    """
    import triton
    import vllm.v1.worker.gpu.model_runner as model_runner
    from torch._dynamo.utils import counters

    decoding: Counter[str] = Counter()
    reading: Counter[str] = Counter()
    compiled: list[str] = []
    stock = model_runner.dispatch_cg_and_sync_dp

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        dispatched = stock(*args, **kwargs)
        # vLLM gives no longest row count for steps that read prompts.
        plain = kwargs.get("max_query_len") is not None
        (decoding if plain else reading)[dispatched[0].cg_mode.name] += 1
        return dispatched

    def note(*args: Any, **kwargs: Any) -> None:
        compiled.append(str(kwargs.get("repr", kwargs.get("key", "a kernel"))))

    # Twice: what vLLM itself compiles when it meets such requests.
    for _ in range(2):
        llm.generate(prompts, params, use_tqdm=False)
    graphs = sum(counters["stats"].values())
    triton.knobs.runtime.jit_post_compile_hook = note
    model_runner.dispatch_cg_and_sync_dp = dispatch
    try:
        while decoding.total() + reading.total() < steps:
            llm.generate(prompts, params, use_tqdm=False)
    finally:
        model_runner.dispatch_cg_and_sync_dp = stock
        triton.knobs.runtime.jit_post_compile_hook = None
    if sum(counters["stats"].values()) != graphs:
        compiled.append("torch.compile")
    return {
        "steps": decoding.total() + reading.total(),
        "decoding": dict(decoding),
        "reading": dict(reading),
        "compiled": compiled,
    }
