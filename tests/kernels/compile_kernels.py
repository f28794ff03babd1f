"""Compile every Triton kernel for GPUs that need not be there, and report its size.

The interpreter is lenient: it does not see a type that changes in a loop, a shape that
is no power of two, or more shared memory than there is. Run as a program, without
TRITON_INTERPRET: the kernels are launched on CPU tensors, but compiled instead of run.
The last line of output is JSON: one object per compiled kernel.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.kernels.trees import random_policy, tables_of
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.triton import (
    fill_tree,
    kv_compact,
    ngram,
    place_tree,
    tree_attention,
    tree_walk,
)
from vllm_ppd.trees.bigram import BigramTensors

# (kernel, compute capability, arguments, options)
LAUNCHES: list[tuple[triton.JITFunction, int, tuple, dict]] = []


def compile_launch(index: int) -> dict:
    """Compile a recorded launch as Triton would before it runs it."""
    kernel, capability, args, options = LAUNCHES[index]
    target = GPUTarget("cuda", capability, 32)
    gpu = SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    driver.set_active(gpu)
    compiled = kernel.warmup(*args, grid=(1,), **options)
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared": compiled.metadata.shared,
        "undefined": undefined_values(compiled.asm["llir"]),
        **registers(compiled),
    }


def undefined_values(llir: str) -> list[str]:
    """Loads that leave garbage where their mask is off.

    A constant that its type cannot hold, minus infinity for an integer, say, compiles
    to whatever is in the register; interpreted, it is some number.
    """
    lines = (line.strip() for line in llir.splitlines())
    return [line for line in lines if "asm sideeffect" in line and "poison" in line]


def registers(compiled) -> dict[str, int]:
    """Registers per thread, and bytes of stack, where what does not fit goes."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [folder / "cuobjdump", "--dump-resource-usage", cubin.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
    fields = (word.split(":") for word in output.stdout.split() if ":" in word)
    usage = {field[0]: field[1] for field in fields}
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"])}


def ints(*shape, dtype=torch.int32):
    return torch.ones(shape, dtype=dtype)


def launch_attention(dtype, dim, kv_heads, group, rows, window, splits):
    cache = torch.zeros(4, kv_heads, 16, 2 * dim, dtype=dtype)
    query = torch.zeros(rows, kv_heads * group, dim, dtype=dtype)
    masks = ints(rows, 1, dtype=torch.int64)
    batch = TreeBatch(ints(1, 64), ints(1), ints(1), ints(1), masks, ints(rows), rows)
    tree_attention.tree_attention(
        query, *cache.split(dim, -1), torch.empty_like(query), batch, 0.1,
        float(window > 0), window, splits,
    )  # fmt: skip


def launch_small_kernels():
    policy = random_policy(np.random.default_rng(0))
    tables = DeviceTables.on("cpu", tables_of(policy, num_rows=64))
    trees, longs = ints(4), ints(128, dtype=torch.int64)
    walk = tree_walk.tree_walk(tables, trees, trees, trees, ints(128), longs, trees)
    drafts = ints(4, 63, dtype=torch.int64)
    pool = ints(4, 3, 32, dtype=torch.int64)
    logits = torch.zeros(4, 3, 99, dtype=torch.bfloat16)
    listed = ints(99, 16, dtype=torch.int64)
    bigram = BigramTensors(listed, torch.ones(99, 16), torch.ones(99))
    for dtype in (torch.bfloat16, torch.float32):
        scores = torch.zeros(4, 3, 32, dtype=dtype)
        inputs = fill_tree.DeviceDraftInputs(
            trees, logits, pool, scores, trees, ints(4, 8)
        )
        fill_tree.fill_tree(tables, trees, inputs, bigram, torch.ones(3), drafts)
    ngram.match_ngrams(longs.view(2, 64), longs[:2], ints(2), 64)
    masks = ints(128, 1, dtype=torch.int64)
    place_tree.place_tree(
        tables, trees, trees, ints(5), trees, longs, masks, ints(128), trees, trees
    )
    caches = [torch.zeros(4, 8, 16, 256, dtype=torch.bfloat16) for _ in range(2)]
    compactor = kv_compact.KVCompactor(caches)
    compactor.run(longs, trees, walk.paths, walk.num_sampled)


def main() -> None:
    choose, cuda = tree_attention._choose_shape.__wrapped__, torch.device("cuda")
    tree_attention._choose_shape = lambda *args: choose(*args[:-1], cuda)
    for capability in map(int, sys.argv[1:]):
        properties = SimpleNamespace(
            multi_processor_count=132, major=capability // 10, minor=capability % 10
        )
        torch.cuda.get_device_properties = lambda _, result=properties: result

        def record(kernel, grid, capability=capability):
            launch = kernel, capability
            return lambda *args, **options: LAUNCHES.append((*launch, args, options))

        # A launch is recorded instead of run.
        triton.JITFunction.__getitem__ = record
        # Each case is one that has been too large, or nearly so.
        launch_attention(torch.float16, 256, 2, 2, 64, 4096, 1)
        if capability >= 90:
            launch_attention(torch.bfloat16, 128, 8, 4, 64, 0, None)
            launch_attention(torch.bfloat16, 128, 264, 4, 64, 0, None)
            launch_attention(torch.float32, 128, 2, 2, 64, 0, 1)
            launch_small_kernels()
    # Forked processes have the launches already, which cannot be pickled.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        reports = pool.map(compile_launch, range(len(LAUNCHES)), chunksize=1)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
