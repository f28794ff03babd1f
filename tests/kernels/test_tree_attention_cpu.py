"""CPU tree attention: literal examples, a nested-loop oracle, awkward shapes.

Every case runs the torch reference and the compiled kernel on the same cache. The
cache starts as nan, so that reading a slot that no row may see shows in the output.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace

import pytest
import torch

from tests.kernels.attention_cases import Request, chain, make_step, oracle
from vllm_ppd.kernels.cpu import (
    CpuTreeAttention,
    build,
    key_view,
    load_library,
    value_view,
)
from vllm_ppd.kernels.tree_attention import tree_attention_reference

# Against a float64 oracle with values of order 1. float32: a few roundings of sums
# over up to 2k tokens. 16 bit: sums are float32 as well, and then the output is
# rounded once, by half a unit in the last place (relative 2^-8, 2^-11).
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2**-11, "atol": 2e-6},
}


@pytest.fixture(params=["reference", "compiled"])
def attend(request):
    """Either implementation, called as attend(query, kv_cache, output, batch, ...)."""

    def reference(query, kv_cache, output, batch, *options):
        keys, values = key_view(kv_cache), value_view(kv_cache)
        tree_attention_reference(query, keys, values, output, batch, *options)

    def compiled(query, kv_cache, output, batch, *options):
        plan = CpuTreeAttention(batch)
        plan.run(query, kv_cache, output, *options)

    if request.param == "reference":
        return reference
    if load_library() is None:
        pytest.skip("no C++ compiler")
    return compiled


def check(attend, requests, heads, kv_heads, dim, block_size, dtype=torch.float32,
          softcap=0.0, window=0, words=None):  # fmt: skip
    step = make_step(
        requests, heads, kv_heads, dim, block_size, dtype,
        layout="CPU", words=words, gap=3,
    )  # fmt: skip
    output = torch.full_like(step.query, 7.0)
    expected = output.double()
    attend(step.query, step.cache, output, step.batch, dim**-0.5, softcap, window)
    for token, row in oracle(step, dim**-0.5, softcap, window).items():
        expected[token] = row
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])


def one_head(request, dtype=torch.float32):
    step = make_step([request], 1, 1, 16, 16, dtype, layout="CPU")
    return step, torch.zeros_like(step.query)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    torch.manual_seed(0)


# ---- literal ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        # Context value 1, root 2, siblings 4 and 8, a child of the last 16.
        (0, [3 / 2, 7 / 3, 11 / 3, 27 / 4]),
        # Positions: context 0, root 1, siblings 2 and 2, child 3.
        (2, [3 / 2, 6 / 2, 10 / 2, 24 / 2]),
        (1, [2.0, 4.0, 8.0, 16.0]),
    ],
)
def test_equal_keys_average_the_visible_values(attend, window, expected):
    step, output = one_head(Request(1, 4, parents=[-1, 0, 0, 2]))
    block = step.batch.block_table[0, 0]
    step.keys[block] = 0
    step.values[block, 0, :5] = torch.tensor([1.0, 2, 4, 8, 16])[:, None]
    attend(step.query, step.cache, output, step.batch, 1.0, 0.0, window)
    want = torch.tensor(expected)[:, None, None].expand(-1, 1, 16)
    torch.testing.assert_close(output[:4], want, rtol=1e-6, atol=0)


def test_a_large_score_takes_all_the_weight(attend):
    step, output = one_head(Request(40, 2, parents=[-1, 0]))
    blocks = step.batch.block_table[0, :3].long()
    step.keys[blocks] = 0
    step.keys[blocks[0], 0, 3] = 100.0
    step.query.fill_(1.0)
    attend(step.query, step.cache, output, step.batch, 1.0)
    want = step.values[blocks[0], 0, 3].expand(2, 1, 16)
    torch.testing.assert_close(output[:2], want)


def test_soft_cap_bounds_the_scores(attend):
    step, output = one_head(Request(1, 1))
    block = step.batch.block_table[0, 0]
    step.keys[block, 0, :2] = torch.tensor([1000.0, 0.0])[:, None]
    step.values[block, 0, :2] = torch.tensor([1.0, 0.0])[:, None]
    step.query.fill_(1.0)
    attend(step.query, step.cache, output, step.batch, 1.0, 2.0)
    want = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(output[0], torch.full_like(output[0], want))


# ---- against the oracle -----------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [
        (4, 2, 64, 32),
        (1, 1, 80, 16),
        (8, 1, 128, 128),
        (6, 2, 96, 32),
        (3, 3, 256, 16),
        (5, 1, 16, 32),
    ],
)
def test_shapes(attend, dtype, heads, kv_heads, dim, block_size):
    shapes = [(0, 1), (5, 9), (127, 2), (130, 17), (0, 33), (256, 1)]
    requests = [Request(context, rows) for context, rows in shapes]
    check(attend, requests, heads, kv_heads, dim, block_size, dtype)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 31, 64, 65, 128])
@pytest.mark.parametrize("context", [0, 1, 16, 61])
def test_rows_and_contexts(attend, rows, context):
    check(attend, [Request(context, rows)], 2, 1, 16, 32)


@pytest.mark.parametrize("rows", [1, 3, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_thousand_tokens(attend, rows, dtype):
    """Enough work for several threads; one KV head, so that rows are split too."""
    check(attend, [Request(2000, rows)], 2, 1, 64, 32, dtype)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("window", [1, 2, 5, 20, 130, 1000])
def test_window_and_soft_cap(attend, softcap, window):
    shapes = [(0, 20), (3, 70), (40, 6), (300, 20)]
    requests = [Request(context, rows) for context, rows in shapes]
    requests.append(chain(150, 40))
    check(attend, requests, 4, 2, 32, 16, softcap=softcap, window=window)


def test_window_skips_blocks_that_vllm_freed(attend):
    step, want = one_head(Request(200, 5))
    attend(step.query, step.cache, want, step.batch, 1.0, 0.0, 40)
    table = step.batch.block_table.clone()
    table[0, : (200 - 40) // 16] = 0
    step.cache[0] = step.cache[0].nan_to_num(math.nan)
    got = torch.zeros_like(want)
    batch = replace(step.batch, block_table=table)
    attend(step.query, step.cache, got, batch, 1.0, 0.0, 40)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_two_mask_words_for_a_small_tree(attend):
    check(attend, [Request(10, 12)], 2, 1, 32, 16, words=2)


def test_no_rows_writes_nothing(attend):
    step, output = one_head(Request(10, 2))
    output.fill_(7.0)
    none = replace(step.batch, num_rows=torch.zeros_like(step.batch.num_rows))
    attend(step.query, step.cache, output, none, 1.0)
    assert output.eq(7.0).all()


def test_strided_query_and_cache(attend):
    """vLLM hands out slices of a fused projection, and layers inside one buffer."""
    step = make_step(
        [Request(50, 9)], 4, 2, 32, 16, torch.bfloat16, layout="CPU", gap=3
    )
    query, cache = step.query, step.cache
    want = torch.zeros_like(query)
    attend(query, cache, want, step.batch, 0.2)
    fused = torch.randn(query.shape[0], 10, 32).bfloat16()
    fused[:, 3:7] = query
    buffer = torch.full((2, *cache.shape), math.nan).bfloat16().transpose(0, 1)
    buffer[:, 1] = cache
    got = torch.zeros_like(fused)
    attend(fused[:, 3:7], buffer[:, 1], got[:, 2:6], step.batch, 0.2)
    assert torch.equal(got[:, 2:6], want)
    assert got[:, :2].eq(0).all() and got[:, 6:].eq(0).all()


def test_shapes_without_a_kernel_use_the_reference():
    def attend(query, cache, output, batch, *options):
        CpuTreeAttention(batch).run(query, cache, output, *options)

    check(attend, [Request(20, 5)], 2, 1, 24, 24)


def test_too_many_rows_for_the_mask_is_an_error(attend):
    step, output = one_head(Request(3, 70))
    masks = step.batch.ancestors[:, :1].contiguous()
    narrow = replace(step.batch, ancestors=masks)
    with pytest.raises((ValueError, RuntimeError), match="mask"):
        attend(step.query, step.cache, output, narrow, 1.0)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("block_table", torch.zeros(1), r"int32 \[1, 1\]"),
        ("starts", torch.zeros(2).int(), r"int32 or int64 \[1\]"),
        ("ancestors", torch.zeros(7, 1).int(), r"int64 \[7, 1\]"),
        ("depths", torch.zeros(3).long(), r"int32 or int64 \[7\]"),
    ],
)
def test_a_batch_of_other_shapes_or_types_is_an_error(name, tensor, expected):
    batch = one_head(Request(3, 4))[0].batch
    with pytest.raises(ValueError, match=f"{name} must be {expected}, not"):
        replace(batch, **{name: tensor})


def test_mixed_types_are_an_error():
    if load_library() is None:
        pytest.skip("no C++ compiler")
    step, output = one_head(Request(3, 4))
    query, output = step.query.bfloat16(), output.bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        CpuTreeAttention(step.batch).run(query, step.cache, output, 1.0)


# ---- the build --------------------------------------------------------------------


def test_without_a_compiler_one_warning_and_none(monkeypatch, caplog):
    from torch._inductor.codecache import CppCodeCache

    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nmore lines")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    with caplog.at_level(logging.WARNING):
        assert build.load_library.__wrapped__() is None
    (record,) = caplog.records
    assert "No working C++ compiler" in record.message
    assert "\n" not in record.message


def test_one_openmp_runtime():
    if load_library() is None:
        pytest.skip("no C++ compiler")
    with open("/proc/self/maps") as file:
        paths = {line.split()[-1] for line in file if "omp.so" in line}
    assert len({p for p in paths if "libgomp" in p or "libiomp" in p}) <= 1, paths
