"""A chain is a tree: its attention must equal vLLM's own causal CPU kernel."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import cpu_only
from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.kernels.cpu.tree_attention import CpuTreeAttention
from vllm_ppd.kernels.tree_attention import TreeBatch

pytestmark = [pytest.mark.engine, cpu_only]

# vLLM's kernel sums in another order; for bfloat16 it also rounds the softmax
# weights to bfloat16, half a unit in the last place (2^-8 relative).
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [-1, 50])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [64, 80])
def test_chain_equals_vllm_causal(dtype, dim, window, softcap):
    ops = pytest.importorskip("vllm._custom_ops")
    if load_library() is None or not hasattr(
        torch.ops._C, "cpu_attention_with_kv_cache"
    ):
        pytest.skip("needs a C++ compiler and vLLM's CPU build")
    torch.manual_seed(0)
    heads, kv_heads, block_size = 4, 2, 32
    # Both ISA names share the layout that the tree kernel reads.
    isa = "vec" if dim % 32 == 0 else "vec16"
    rows, contexts = [1, 17, 5], [0, 100, 333]
    totals = [c + q for c, q in zip(contexts, rows, strict=True)]
    needed = [-(-total // block_size) for total in totals]
    table = torch.zeros(3, max(needed), dtype=torch.int32)
    free = torch.randperm(sum(needed), dtype=torch.int32).split(needed)
    cache = torch.zeros(sum(needed), kv_heads, block_size, 2 * dim, dtype=dtype)
    packed = cache.view(sum(needed), kv_heads, block_size * 2, dim)
    key_cache, value_cache = packed.chunk(2, dim=2)
    for r, (total, blocks) in enumerate(zip(totals, free, strict=True)):
        table[r, : len(blocks)] = blocks
        slot = torch.arange(total)
        slots = blocks[slot // block_size].long() * block_size + slot % block_size
        key, value = torch.randn(2, total, kv_heads, dim).to(dtype)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    query = torch.randn(sum(rows), heads, dim).to(dtype)
    scale = dim**-0.5
    starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(totals, dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=3,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa=isa,
        enable_kv_split=True,
    )
    want = torch.zeros_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=want,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=window,
        block_table=table,
        softcap=softcap,
        scheduler_metadata=metadata,
        s_aux=None,
    )

    depths = torch.cat([torch.arange(q, dtype=torch.int32) for q in rows])
    batch = TreeBatch(
        table,
        starts[:-1],
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        ((2 << depths.long()) - 1)[:, None],  # a chain: every earlier row
        depths,
    )
    got = torch.zeros_like(query)
    CpuTreeAttention(batch).run(query, cache, got, scale, softcap, window)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
