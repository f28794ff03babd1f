"""Compile every Triton kernel for GPUs that need not be there, and report its size.

The interpreter is lenient: it does not see a type that changes in a loop, a shape that
is no power of two, or more shared memory than there is. Run as a program, without
TRITON_INTERPRET: the kernels are launched on CPU tensors, but compiled instead of run.
The last line of output is JSON: one object per compiled kernel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vllm_ppd.kernels.triton.fill_tree as fill_module
import vllm_ppd.kernels.triton.kv_compact as compact_module
import vllm_ppd.kernels.triton.ngram as ngram_module
import vllm_ppd.kernels.triton.place_tree as place_module
import vllm_ppd.kernels.triton.tree_attention as attention_module
import vllm_ppd.kernels.triton.tree_walk as walk_module
from tests.kernels.trees import random_policy, tables_of
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.fill_tree import DeviceDraftInputs
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.trees.drafting import BigramTensors

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}


class CompileOnly:
    """Takes a kernel's place; a launch compiles it as Triton would."""

    def __init__(self, kernel, capability, reports):
        self.kernel, self.capability, self.reports = kernel, capability, reports

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, num_stages=3, **kwargs):
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            options = {"num_warps": num_warps, "num_stages": num_stages}
            target = GPUTarget("cuda", self.capability, 32)
            source = ASTSource(self.kernel, *self.specialize(given))
            compiled = triton.compile(source, target=target, options=options)
            report = {
                "kernel": self.kernel.__name__,
                "capability": self.capability,
                "shared": compiled.metadata.shared,
                "undefined": undefined_values(compiled.asm["llir"]),
                **registers(compiled),
            }
            self.reports.append(report)

        return launch

    def specialize(self, given):
        """Signature, constants and attributes, with Triton's rules for integers."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            value = given[name]
            free = parameter.do_not_specialize
            divisible = True
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
            elif parameter.is_constexpr or value is None or (value == 1 and not free):
                signature[name], constants[(index,)] = "constexpr", value
                divisible = False
            elif isinstance(value, float):
                signature[name], divisible = "fp32", False
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                divisible = value % 16 == 0 and not free
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes


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
    cubin = Path("kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    command = [folder / "cuobjdump", "--dump-resource-usage", cubin]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    fields = (word.split(":") for word in found.stdout.split() if ":" in word)
    usage = {field[0]: field[1] for field in fields}
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"])}


def ints(*shape, dtype=torch.int32):
    return torch.ones(shape, dtype=dtype)


def launch_attention(dtype, cache_dtype, dim, kv_heads, group, rows, window, splits):
    cache = torch.zeros(4, kv_heads, 16, 2 * dim, dtype=cache_dtype or dtype)
    query = torch.zeros(rows, kv_heads * group, dim, dtype=dtype)
    batch = TreeBatch(
        ints(1, 64), ints(1), ints(1), ints(1), ints(rows, 1, dtype=torch.int64),
        ints(rows), rows,
    )  # fmt: skip
    scale = torch.ones(1) if cache_dtype else None
    attention_module.tree_attention(
        query, *cache.split(dim, -1), torch.empty_like(query), batch, 0.1,
        float(window > 0), window, None, scale, scale, splits,
    )  # fmt: skip


def launch_small_kernels(cache_dtype):
    tables = DeviceTables.on("cpu", tables_of(random_policy(), num_rows=64))
    trees, longs = ints(4), ints(128, dtype=torch.int64)
    walk = walk_module.tree_walk(tables, trees, trees, trees, ints(128), longs, trees)
    drafts = ints(4, 63, dtype=torch.int64)
    inputs = DeviceDraftInputs(
        trees, torch.zeros(4, 3, 99, dtype=torch.bfloat16),
        ints(4, 3, 32, dtype=torch.int64), torch.zeros(4, 3, 32), trees, ints(4, 8),
    )  # fmt: skip
    table = BigramTensors(
        ints(99, 16, dtype=torch.int64), torch.ones(99, 16), torch.ones(99)
    )
    for kind in (torch.bfloat16, torch.float32, torch.int64):
        inputs = inputs._replace(scores=inputs.scores.to(kind))
        fill_module.fill_tree(tables, trees, inputs, table, torch.ones(3), drafts)
    ngram_module.match_ngrams(longs.view(2, 64), longs[:2], ints(2), 64)
    place_module.place_tree(
        tables, trees, trees, ints(5), trees, longs, ints(128, 1, dtype=torch.int64),
        ints(128), trees, trees,
    )  # fmt: skip
    caches = [torch.zeros(4, 8, 16, 256).to(cache_dtype) for _ in range(2)]
    compact = compact_module.KVCompactor(caches)
    compact.run(longs, trees, walk.paths, walk.num_sampled)


def main() -> None:
    reports: list[dict] = []
    modules = (
        attention_module, compact_module, fill_module, ngram_module,
        place_module, walk_module,
    )  # fmt: skip
    kernels = {
        (module, name): kernel
        for module in modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel")
    }
    choose = attention_module._choose_shape.__wrapped__
    attention_module._choose_shape = lambda *args: choose(
        *args[:-1], torch.device("cuda")
    )
    for capability in map(int, sys.argv[1:]):
        properties = SimpleNamespace(
            multi_processor_count=132, major=capability // 10, minor=capability % 10
        )
        torch.cuda.get_device_properties = lambda _, found=properties: found
        for (module, name), kernel in kernels.items():
            setattr(module, name, CompileOnly(kernel, capability, reports))
        # Each case is one that has been too large, or nearly so.
        launch_attention(torch.float16, None, 256, 2, 2, 64, 4096, 1)
        if capability >= 90:
            launch_attention(torch.bfloat16, None, 128, 8, 4, 64, 0, None)
            launch_attention(torch.bfloat16, None, 128, 264, 4, 64, 0, None)
            fp8 = torch.float8_e4m3fn
            launch_attention(torch.bfloat16, fp8, 128, 8, 1, 64, 0, 1)
            launch_attention(torch.float32, None, 128, 2, 2, 64, 0, 1)
            launch_small_kernels(torch.bfloat16)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
