"""CPU tree attention: literal examples, a nested-loop oracle, awkward shapes.

Every case runs the torch reference and the compiled kernel on the same cache. The
cache starts as nan, so that reading a slot that no row may see shows in the output.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from vllm_ppd.kernels.cpu import (
    CpuTreeAttention,
    build,
    key_view,
    load_library,
    value_view,
)
from vllm_ppd.kernels.tree_attention import TreeBatch, tree_attention_reference

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


@dataclass
class Request:
    """A random tree over a random context, as plain Python data."""

    context: int
    parents: list[int]  # -1 for the root
    keys: torch.Tensor  # [context + q, kv_heads, D]
    values: torch.Tensor

    def ancestors(self, i: int) -> list[int]:
        return [*self.ancestors(self.parents[i]), i] if i >= 0 else []

    def depth(self, i: int) -> int:
        return len(self.ancestors(i)) - 1


def make_request(context, parents, kv_heads, dim, dtype) -> Request:
    shape = (context + len(parents), kv_heads, dim)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return Request(context, parents, keys, values)


def random_parents(rows: int) -> list[int]:
    return [-1, *(random.randrange(i) for i in range(1, rows))][:rows]


def build_step(requests, heads, block_size, gap=3, words=None):
    """Pack requests into a shuffled cache; `gap` foreign tokens around each."""
    kv_heads, dim = requests[0].keys.shape[1:]
    dtype = requests[0].keys.dtype
    needed = [-(-len(r.keys) // block_size) for r in requests]
    free = list(range(sum(needed) + 2))
    random.shuffle(free)
    cache = torch.full(
        (len(free), kv_heads, block_size, 2 * dim), math.nan, dtype=dtype
    )
    table = torch.full((len(requests), max(needed) + 1), -1, dtype=torch.int32)
    tokens = gap + sum(len(r.parents) + gap for r in requests)
    words = words or (2 if max(len(r.parents) for r in requests) > 64 else 1)
    ancestors = torch.zeros(tokens, words, dtype=torch.int64)
    depths = torch.zeros(tokens, dtype=torch.int32)
    starts, token = [], gap
    for r, request in enumerate(requests):
        starts.append(token)
        for slot, (key, value) in enumerate(
            zip(request.keys, request.values, strict=True)
        ):
            index, offset = divmod(slot, block_size)
            if offset == 0:
                table[r, index] = free.pop()
            # The layout in words: keys transposed, then values, per (block, head).
            flat = cache[int(table[r, index])].view(kv_heads, -1)
            flat[:, offset : block_size * dim : block_size] = key
            at = block_size * dim + offset * dim
            flat[:, at : at + dim] = value
        for i in range(len(request.parents)):
            for j in request.ancestors(i):
                bit = 1 << (j % 64)
                ancestors[token + i, j // 64] |= bit if bit < 2**63 else bit - 2**64
            depths[token + i] = request.depth(i)
        token += len(request.parents) + gap
    batch = TreeBatch(
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([len(r.parents) for r in requests], dtype=torch.int32),
        torch.tensor([r.context for r in requests], dtype=torch.int32),
        ancestors,
        depths,
    )
    return batch, cache, torch.randn(tokens, heads, dim).to(dtype)


def oracle(requests, batch, query, scale, softcap=0.0, window=0):
    """Row by row, head by head, key by key, in float64: {token: [H, D]}."""
    expected = {}
    for request, start in zip(requests, batch.starts.tolist(), strict=True):
        keys, values = request.keys.double().numpy(), request.values.double().numpy()
        for i in range(len(request.parents)):
            position = request.context + request.depth(i)
            slots = []
            for s in range(request.context):
                if window <= 0 or s > position - window:
                    slots.append(s)
            for j in request.ancestors(i):
                at = request.context + request.depth(j)
                if window <= 0 or at > position - window:
                    slots.append(request.context + j)
            rows = []
            for h, q in enumerate(query[start + i].double().numpy()):
                kv_head = h * keys.shape[1] // query.shape[1]
                scores = keys[slots, kv_head] @ q * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                rows.append(weights @ values[slots, kv_head] / weights.sum())
            expected[start + i] = torch.from_numpy(np.stack(rows))
    return expected


def check(attend, requests, heads, block_size, softcap=0.0, window=0, **options):
    batch, cache, query = build_step(requests, heads, block_size, **options)
    before = torch.full_like(query, 7.0)
    output = before.clone()
    scale = query.shape[2] ** -0.5
    attend(query, cache, output, batch, scale, softcap, window)
    expected = before.double()
    for token, row in oracle(requests, batch, query, scale, softcap, window).items():
        expected[token] = row
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[query.dtype])


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
    request = make_request(1, [-1, 0, 0, 2], 1, 16, torch.float32)
    request.keys.zero_()
    request.values[:] = torch.tensor([1.0, 2, 4, 8, 16])[:, None, None]
    batch, cache, query = build_step([request], heads=1, block_size=16, gap=0)
    output = torch.zeros_like(query)
    attend(query, cache, output, batch, 1.0, 0.0, window)
    want = torch.tensor(expected)[:, None, None].expand_as(output)
    torch.testing.assert_close(output, want, rtol=1e-6, atol=0)


def test_a_large_score_takes_all_the_weight(attend):
    request = make_request(40, [-1, 0], 1, 16, torch.float32)
    request.keys.zero_()
    request.keys[3] = 100.0
    batch, cache, query = build_step([request], heads=1, block_size=16, gap=0)
    query.fill_(1.0)
    output = torch.zeros_like(query)
    attend(query, cache, output, batch, 1.0)
    torch.testing.assert_close(output, request.values[3].expand_as(output))


def test_soft_cap_bounds_the_scores(attend):
    request = make_request(1, [-1], 1, 16, torch.float32)
    request.keys[:] = torch.tensor([1000.0, 0.0])[:, None, None]
    request.values[:] = torch.tensor([1.0, 0.0])[:, None, None]
    batch, cache, query = build_step([request], heads=1, block_size=16, gap=0)
    query.fill_(1.0)
    output = torch.zeros_like(query)
    attend(query, cache, output, batch, 1.0, 2.0)
    want = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(output, torch.full_like(output, want))


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
    requests = [
        make_request(context, random_parents(rows), kv_heads, dim, dtype)
        for context, rows in [(0, 1), (5, 9), (127, 2), (130, 17), (0, 33), (256, 1)]
    ]
    check(attend, requests, heads, block_size)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 31, 64, 65, 128])
@pytest.mark.parametrize("context", [0, 1, 16, 61])
def test_rows_and_contexts(attend, rows, context):
    request = make_request(context, random_parents(rows), 1, 16, torch.float32)
    check(attend, [request], 2, 32)


@pytest.mark.parametrize("rows", [1, 3, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_thousand_tokens(attend, rows, dtype):
    """Enough work for several threads; one KV head, so that rows are split too."""
    request = make_request(2000, random_parents(rows), 1, 64, dtype)
    check(attend, [request], 2, 32)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("window", [1, 2, 5, 20, 130, 1000])
def test_window_and_soft_cap(attend, softcap, window):
    requests = [
        make_request(context, random_parents(rows), 2, 32, torch.float32)
        for context, rows in [(0, 20), (3, 70), (40, 6), (300, 20)]
    ]
    # A chain is the deepest tree: its rows differ most in what the window shows.
    requests.append(make_request(150, list(range(-1, 39)), 2, 32, torch.float32))
    check(attend, requests, 4, 16, softcap, window)


def test_window_skips_blocks_that_vllm_freed(attend):
    request = make_request(200, random_parents(5), 1, 16, torch.float32)
    batch, cache, query = build_step([request], 1, 16)
    want = torch.zeros_like(query)
    attend(query, cache, want, batch, 1.0, 0.0, 40)
    table = batch.block_table.clone()
    table[0, : (200 - 40) // 16] = 0
    cache[0] = cache[0].nan_to_num(math.nan)
    got = torch.zeros_like(query)
    attend(query, cache, got, replace(batch, block_table=table), 1.0, 0.0, 40)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_two_mask_words_for_a_small_tree(attend):
    request = make_request(10, random_parents(12), 1, 32, torch.float32)
    check(attend, [request], 2, 16, words=2)


def test_no_rows_writes_nothing(attend):
    request = make_request(10, [-1, 0], 1, 16, torch.float32)
    batch, cache, query = build_step([request], 1, 16)
    output = torch.full_like(query, 7.0)
    none = replace(batch, num_rows=torch.zeros_like(batch.num_rows))
    attend(query, cache, output, none, 1.0)
    assert output.eq(7.0).all()


def test_strided_query_and_cache(attend):
    """vLLM hands out slices of a fused projection, and layers inside one buffer."""
    request = make_request(50, random_parents(9), 2, 32, torch.bfloat16)
    batch, cache, query = build_step([request], 4, 16)
    want = torch.zeros_like(query)
    attend(query, cache, want, batch, 0.2)
    fused = torch.randn(query.shape[0], 10, 32).bfloat16()
    fused[:, 3:7] = query
    buffer = torch.full((2, *cache.shape), math.nan).bfloat16().transpose(0, 1)
    buffer[:, 1] = cache
    got = torch.zeros_like(fused)
    attend(fused[:, 3:7], buffer[:, 1], got[:, 2:6], batch, 0.2)
    assert torch.equal(got[:, 2:6], want)
    assert got[:, :2].eq(0).all() and got[:, 6:].eq(0).all()


def test_shapes_without_a_kernel_use_the_reference():
    request = make_request(20, random_parents(5), 1, 24, torch.float32)

    def attend(query, cache, output, batch, *options):
        CpuTreeAttention(batch).run(query, cache, output, *options)

    check(attend, [request], 2, 24)


def test_too_many_rows_for_the_mask_is_an_error(attend):
    request = make_request(3, random_parents(70), 1, 16, torch.float32)
    batch, cache, query = build_step([request], 1, 16)
    narrow = replace(batch, ancestors=batch.ancestors[:, :1].contiguous())
    with pytest.raises((ValueError, RuntimeError), match="mask"):
        attend(query, cache, torch.zeros_like(query), narrow, 1.0)


def test_mixed_types_are_an_error():
    if load_library() is None:
        pytest.skip("no C++ compiler")
    request = make_request(3, random_parents(4), 1, 16, torch.float32)
    batch, cache, query = build_step([request], 1, 16)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        output = torch.zeros_like(query).bfloat16()
        CpuTreeAttention(batch).run(query.bfloat16(), cache, output, 1.0)


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
