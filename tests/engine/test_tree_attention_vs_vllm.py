"""A chain is a tree: its attention must equal vLLM's own causal CPU kernel."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine.conftest import cpu_only
from tests.kernels.attention_cases import chain, make_step
from tests.kernels.implementations import needs_compiler
from vllm_ppd.kernels.cpu.tree_attention import CpuTreeAttention

pytestmark = [pytest.mark.engine, cpu_only, needs_compiler]

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
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        pytest.skip("needs vLLM's CPU build")
    random.seed(0)
    torch.manual_seed(0)
    heads, kv_heads = 4, 2
    chains = [chain(0, 1), chain(100, 17), chain(333, 5)]
    step = make_step(chains, heads, kv_heads, dim, 32, dtype, "CPU")
    # vLLM reads whole blocks before it masks.
    cache, batch = step.cache.nan_to_num(), step.batch
    rows = sum(each.rows for each in chains)
    query, scale = step.query[:rows], dim**-0.5
    # Both ISA names share the layout that the tree kernel reads.
    isa = "vec" if dim % 32 == 0 else "vec16"
    starts = torch.tensor([*batch.starts, rows], dtype=torch.int32)
    lengths = batch.context_lens + batch.num_rows
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(chains),
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
    packed = cache.view(len(cache), kv_heads, 2 * 32, dim)
    key_cache, value_cache = packed.chunk(2, dim=2)
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
        block_table=batch.block_table.clamp(min=0),
        softcap=softcap,
        scheduler_metadata=metadata,
        s_aux=None,
    )
    got = torch.zeros_like(query)
    CpuTreeAttention(batch).run(query, cache, got, scale, softcap, window)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
