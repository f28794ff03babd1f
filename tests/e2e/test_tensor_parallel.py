"""Two ranks stay token-identical to plain vLLM while the draft length changes.

Started by vLLM's multiprocess executor and by Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engine.test_draft_lengths import two_entries

__all__ = ["two_entries"]

ROOT = Path(__file__).parents[2]

# Run in a process of its own: vLLM starts its workers from there.
SCRIPT = """
import json, os, sys
from vllm import LLM, SamplingParams

def main():
    engine, prompts = json.loads(sys.argv[1])
    if engine["distributed_executor_backend"] == "ray":
        import ray
        ray.init(num_gpus=2, num_cpus=2, include_dashboard=False, log_to_driver=False)
        # vLLM's engine core is another process and joins this cluster.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    llm = LLM(**engine)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    used = set()
    if scheduler.ppd_observer is not None:
        # Another draft length after every few steps, 0 among them.
        controller = scheduler.ppd_observer.controller
        lengths = [13, 0, 5, 13, 5, 0]
        def observe(running, draft_length, tokens, seconds):
            used.add(draft_length)
            observe.steps += 1
            controller.hold(lengths[observe.steps // 3 % len(lengths)])
        observe.steps = 0
        controller.observe = observe
        controller.hold(lengths[0])
    found = []
    for temperature in (0.0, 1.0):
        params = [
            SamplingParams(
                temperature=temperature, max_tokens=40, ignore_eos=True, seed=i
            )
            for i in range(len(prompts))
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([list(o.outputs[0].token_ids) for o in outputs])
    drafts = [
        m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts"
    ]
    print("FOUND " + json.dumps([found, drafts, sorted(used)]))

if __name__ == "__main__":
    main()
"""


def run(folder: Path, engine: dict, prompts: list[str], more: dict[str, str]) -> list:
    script = folder / "two_ranks.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([engine, prompts])],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # A machine may have fewer NUMA nodes than ranks.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # The scheduler is in this script's process, the ranks are in others.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **more,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_two_ranks_decode_as_plain_vllm(request, tmp_path, two_entries, backend):
    more = {}
    if backend == "ray":
        request.getfixturevalue("only_ray")
        if find_spec("ray") is None:
            pytest.skip("ray is not installed (pip install ray)")
        stub = str(ROOT / "tests" / "ray_cpu_stub")
        more["PYTHONPATH"] = os.pathsep.join(
            filter(None, [stub, os.environ.get("PYTHONPATH")])
        )
        more["RAY_USAGE_STATS_ENABLED"] = "0"
    engine = {
        "model": str(ROOT / "demo_model" / "model"),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": backend,
        "disable_log_stats": False,
    }
    prompts = ["def f(x):", "import os\n", "class A:\n    def __init__(self"]
    prompts_folder = str(ROOT / "trained_prompts" / "demo")
    speculative = {
        "method": "ppd",
        "model": prompts_folder,
        "tree": two_entries,
        "profile": "none",
    }
    # Ray changes nothing about plain decoding, so that one start is saved.
    stock = {**engine, "distributed_executor_backend": "mp"}
    expected, _, _ = run(tmp_path, stock, prompts, {})
    with_ppd = {**engine, "speculative_config": speculative}
    actual, drafts, draft_lengths = run(tmp_path, with_ppd, prompts, more)
    assert actual == expected
    assert drafts[0] > 0
    assert draft_lengths == [0, 5, 13]
