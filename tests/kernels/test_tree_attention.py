"""Tree attention in torch, C++ and Triton: literal examples, an oracle, odd shapes.

Slots that no row may see are nan, so that reading one shows in the output.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch

from tests.kernels.attention_cases import (
    PADDED,
    Request,
    chain,
    make_step,
    oracle,
    prefill,
)
from tests.kernels.implementations import DEVICE, kernels, needs_compiler, needs_triton
from vllm_ppd.kernels.cpu.tree_attention import CpuTreeAttention
from vllm_ppd.kernels.tree_attention import tree_attention_reference

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

# Against a float64 oracle with values of order 1. float32: a few roundings of sums
# over up to 2k tokens. 16 bit: sums are float32 as well, and then the output is
# rounded once, by half a unit in the last place (relative 2^-8, 2^-11).
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2**-11, "atol": 2e-6},
}
# Compiled by Triton, 16-bit weights are rounded before they meet the values, too.
TRITON_TOLERANCE = {
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}
UNTOUCHED = 7.0
INPUTS = ("query", "keys", "values")


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    torch.manual_seed(0)


def run_reference(step, query, output, *options, splits=1):
    tree_attention_reference(
        query, step.keys, step.values, output, step.batch, *options
    )


def run_compiled(step, query, output, *options, splits=1):
    CpuTreeAttention(step.batch).run(query, step.cache, output, *options)


def run_triton(step, query, output, *options, splits=1):
    inputs = query, step.keys, step.values, output, step.batch
    kernels.tree_attention.tree_attention(*inputs, *options, num_splits=splits)


@dataclass(frozen=True)
class Implementation:
    """run: called with a step, query, output, scale, softcap, window and splits."""

    run: Callable
    layout: str
    tolerance: dict

    def step(self, requests, heads, kv_heads, dim, block_size, *args, **options):
        options = {"layout": self.layout} | options
        return make_step(requests, heads, kv_heads, dim, block_size, *args, **options)

    def one_head(self, request):
        step = self.step([request], 1, 1, 16, 16)
        return step, torch.zeros_like(step.query)

    def check(self, step, softcap=0.0, window=0, splits=1, expect=oracle):
        """Rows that are in no tree stay as they are."""
        output = torch.full_like(step.query, UNTOUCHED)
        expected = output.double()
        scale = step.query.shape[2] ** -0.5
        self.run(step, step.query, output, scale, softcap, window, splits=splits)
        for token, row in expect(step, scale, softcap, window).items():
            expected[token] = row
        tolerance = self.tolerance[output.dtype]
        torch.testing.assert_close(output.double(), expected, **tolerance)
        return output


REFERENCE = Implementation(run_reference, "CPU", TOLERANCE)
COMPILED = Implementation(run_compiled, "CPU", TOLERANCE)
TRITON = Implementation(run_triton, "HND", TRITON_TOLERANCE)
ON_CPU = [
    pytest.param(REFERENCE, id="reference"),
    pytest.param(COMPILED, id="compiled", marks=needs_compiler),
]
ALL = [*ON_CPU, pytest.param(TRITON, id="triton", marks=needs_triton)]
all_of_them = pytest.mark.parametrize("attend", ALL)
on_cpu = pytest.mark.parametrize("attend", ON_CPU)


# ---- literal ----------------------------------------------------------------------


# W is the weight of the context beside a row of score 0.
W = math.exp(2)
CAPPED = [(W + 2) / (W + 1), (W + 6) / (W + 2), (W + 10) / (W + 2), (W + 26) / (W + 3)]


@all_of_them
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize(
    ("score", "softcap", "window", "expected"),
    [
        # Context value 1, root 2, siblings 4 and 8, a child of the last 16.
        (0, 0, 0, [3 / 2, 7 / 3, 11 / 3, 27 / 4]),
        # Positions: context 0, root 1, siblings 2 and 2, child 3.
        (0, 0, 2, [3 / 2, 6 / 2, 10 / 2, 24 / 2]),
        (0, 0, 1, [2.0, 4.0, 8.0, 16.0]),
        # A large score takes all the weight, unless a soft cap bounds it.
        (1600, 0, 0, [1.0] * 4),
        (16_000, 2, 0, CAPPED),
    ],
)
def test_weights_of_the_visible_values(attend, score, softcap, window, expected):
    step, output = attend.one_head(Request(1, 4, parents=[-1, 0, 0, 2]))
    block = step.batch.block_table[0, 0]
    step.query.fill_(1.0)
    step.keys[block] = 0
    step.keys[block, 0, 0] = score / 16
    step.values[block, 0, :5] = torch.tensor([1.0, 2, 4, 8, 16])[:, None].to(output)
    attend.run(step, step.query, output, 1.0, softcap, window)
    want = torch.tensor(expected)[:, None, None].expand(-1, 1, 16).to(output)
    torch.testing.assert_close(output[:4], want, rtol=1e-6, atol=0)


# ---- against the oracle -----------------------------------------------------------

MIXED = [
    prefill(5),
    Request(context=130, rows=17),
    PADDED,
    Request(context=5, rows=1),  # plain decoding
    Request(context=0, rows=9),
    Request(context=63, rows=2, plain=3),
    Request(context=0, rows=33),
    Request(context=256, rows=1),
    PADDED,
]


@all_of_them
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "splits"),
    [
        (4, 2, 64, 32, 1),
        (1, 1, 80, 16, 4),
        (8, 1, 128, 128, 1),
        (6, 2, 96, 32, 4),
        (3, 3, 256, 16, 4),
        (5, 1, 16, 32, 2),
        (2, 2, 20, 16, 2),  # C++ has no kernel for it
    ],
)
def test_mixed_batches(attend, heads, kv_heads, dim, block_size, splits, dtype):
    step = attend.step(MIXED, heads, kv_heads, dim, block_size, dtype, gap=3)
    attend.check(step, splits=splits)


@all_of_them
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 31, 64, 65, 128])
@pytest.mark.parametrize("context", [0, 1, 16, 61, 63, 64])
def test_rows_and_contexts(attend, rows, context):
    step = attend.step([Request(context, rows)], 2, 1, 16, 32)
    attend.check(step, splits=1 + context % 2)


@on_cpu
@pytest.mark.parametrize("rows", [1, 3, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_thousand_tokens(attend, rows, dtype):
    """Enough work for several threads; one KV head, so that rows are split too."""
    attend.check(attend.step([Request(2000, rows)], 2, 1, 64, 32, dtype))


@all_of_them
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("window", [0, 1, 2, 5, 20, 130, 1000])
def test_window_and_soft_cap(attend, softcap, window):
    shapes = [(0, 20), (3, 70), (40, 6), (300, 20)]
    requests = [Request(context, rows) for context, rows in shapes]
    kv_heads = 1 if attend is TRITON else 2  # interpreted, a head takes a second
    step = attend.step([*requests, chain(150, 40)], 2 * kv_heads, kv_heads, 32, 16)
    attend.check(step, softcap, window, splits=2)


@all_of_them
def test_window_skips_blocks_that_vllm_freed(attend):
    step, want = attend.one_head(Request(200, 5))
    attend.run(step, step.query, want, 1.0, 0.0, 40)
    # Their entries in the block table mean nothing any more.
    step.batch.block_table[0, : (200 - 40) // 16] = 0
    step.cache[0] = step.cache[0].nan_to_num(math.nan)
    got = torch.zeros_like(want)
    attend.run(step, step.query, got, 1.0, 0.0, 40)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@all_of_them
@pytest.mark.parametrize(("rows", "words"), [(12, 2), (0, None)])
def test_two_mask_words_for_a_small_tree_and_no_rows(attend, rows, words):
    attend.check(attend.step([Request(10, rows)], 2, 1, 32, 16, words=words))


@pytest.mark.parametrize(
    ("attend", "layout"),
    [
        *(pytest.param(*each.values, "CPU", marks=each.marks) for each in ON_CPU),
        pytest.param(TRITON, "HND", marks=needs_triton),
        pytest.param(TRITON, "NHD", marks=needs_triton),
    ],
)
def test_strided_tensors(attend, layout):
    """vLLM hands out slices of a fused projection, and layers inside one buffer."""
    dtype = torch.bfloat16
    step = attend.step([Request(50, 9)], 4, 2, 32, 16, dtype, layout=layout, gap=3)
    want = torch.zeros_like(step.query)
    attend.run(step, step.query, want, 0.2)
    fused = torch.randn(len(step.query), 10, 32).to(step.query)
    fused[:, 3:7] = step.query
    caches = (
        torch.stack([torch.full_like(part, math.nan), part], 1)[:, 1]
        for part in (step.cache, step.keys, step.values)
    )
    cache, keys, values = caches
    inner = replace(step, cache=cache, keys=keys, values=values)
    for each in (step, inner):
        got = torch.zeros_like(fused)
        attend.run(each, fused[:, 3:7], got[:, 2:6], 0.2)
        assert torch.equal(got[:, 2:6], want)
        assert got[:, :2].eq(0).all() and got[:, 6:].eq(0).all()


# ---- bad input --------------------------------------------------------------------


@on_cpu
def test_too_many_rows_for_the_mask_is_an_error(attend):
    step, output = attend.one_head(Request(3, 70))
    masks = step.batch.ancestors[:, :1].contiguous()
    step.batch = replace(step.batch, ancestors=masks)
    with pytest.raises((ValueError, RuntimeError), match="mask"):
        attend.run(step, step.query, output, 1.0)


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
    batch = REFERENCE.one_head(Request(3, 4))[0].batch
    with pytest.raises(ValueError, match=f"{name} must be {expected}, not"):
        replace(batch, **{name: tensor})


@needs_compiler
def test_mixed_types_are_an_error():
    step, output = COMPILED.one_head(Request(3, 4))
    query, output = step.query.bfloat16(), output.bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        CpuTreeAttention(step.batch).run(query, step.cache, output, 1.0)


@needs_triton
def test_tensors_that_do_not_fit_together_are_an_error():
    step = make_step([Request(5, 3)], 4, 2, 16, 16)
    caches = step.keys, step.values
    for query, keys, values in (
        (step.query.mT.contiguous().mT, *caches),
        (step.query[:, :3], *caches),
        (step.query, step.keys[..., :8], step.values),
        # A cache of 8-bit values.
        (step.query, *(cache.to(torch.float8_e4m3fn) for cache in caches)),
    ):
        message = rf"query torch\.float32 \[6, .*key cache {keys.dtype}"
        other = replace(step, keys=keys, values=values)
        with pytest.raises(ValueError, match=message):
            run_triton(other, query, torch.zeros_like(query), 1)


# ---- Triton alone -----------------------------------------------------------------


def by_reference(step, *options):
    """As `oracle`, which is too slow for large steps and has the values of before."""
    output = torch.full_like(step.query, UNTOUCHED)
    run_reference(step, step.query, output, *options)
    return {token: output[token].double() for token in step.tree_rows.nonzero()[:, 0]}


def check_triton(step, splits=1, softcap=0.0, window=0):
    return TRITON.check(step, softcap, window, splits, by_reference)


@needs_compiler
@pytest.mark.parametrize("fault", ["block", "width", "context", "start"])
def test_rows_and_blocks_outside_are_refused(fault):
    """Compiled code would read whatever lies there."""
    step = make_step([Request(70, 9)], 4, 2, 64, 16, torch.float32)
    batch = step.batch
    changed = {
        "block": {"block_table": batch.block_table + len(step.cache)},
        "width": {"block_table": batch.block_table[:, :4]},
        "context": {"context_lens": batch.context_lens - 80},
        "start": {"starts": batch.starts + len(batch.ancestors)},
    }[fault]
    plan = CpuTreeAttention(replace(batch, **changed))
    output = torch.full_like(step.query, UNTOUCHED)
    with pytest.raises(RuntimeError, match="outside the step or the KV cache"):
        plan.run(step.query, step.cache, output, 0.125)
    assert (output == UNTOUCHED).all()


@needs_triton
@pytest.mark.parametrize("splits", [1, 16])
def test_eight_thousand_tokens(splits):
    requests = [Request(8100, 64), PADDED, Request(50, 3), Request(64, 129)]
    check_triton(make_step(requests, 1, 1, 64, 16), splits)


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_large_scores_do_not_overflow():
    step = make_step([Request(30, 4)], 1, 1, 16, 16)
    step.keys.mul_(1000)
    check_triton(step, softcap=30.0)
    # A GPU fuses the scaling of scores with the subtraction of the largest one, as
    # FlashAttention does: from 1e9 on what is left of its rounding would overflow.
    step.keys.mul_(1000)
    check_triton(step)


@needs_triton
def test_rows_that_may_be_more_than_any_request_has():
    step = make_step([Request(40, 12), PADDED], 2, 1, 16, 16)
    want = check_triton(step, splits=2)
    for bound in (None, 40):
        step.batch = replace(step.batch, max_rows=bound)
        assert torch.equal(check_triton(step, splits=2), want)


@needs_triton
@pytest.mark.parametrize(("block_m", "tile"), [(16, 16), (32, 32), (64, 128)])
def test_other_tile_sizes(monkeypatch, block_m, tile):
    """GPUs use smaller tiles where registers are short, and larger ones at leisure."""
    module = kernels.tree_attention
    choose = module._choose_shape

    def other(requests, max_rows, kv_heads, group, *args):
        shape = choose(requests, max_rows, kv_heads, group, *args)
        tiles = -(-max_rows * group // block_m)
        return shape._replace(block_m=block_m, row_tiles=tiles, tile=tile)

    monkeypatch.setattr(module, "_choose_shape", other)
    # Trees within a tile, at its start, across its middle and across two tiles.
    requests = [Request(40, 13), Request(0, 5), Request(60, 9), Request(120, 70)]
    check_triton(make_step(requests, 3, 1, 32, 16), 2)
    check_triton(make_step(requests, 3, 1, 32, 16), 1, window=25)


@needs_triton
def test_keys_whose_elements_are_apart():
    """The CPU backend's blocks hold keys transposed."""
    step = make_step([Request(50, 9)], 2, 2, 32, 16)
    want = check_triton(step)
    step.keys = step.keys.mT.contiguous().mT
    assert torch.equal(check_triton(step), want)


@needs_triton
@needs_gpu
@pytest.mark.gpu
def test_a_captured_graph_follows_its_buffers():
    steps = [
        make_step([Request(context, rows), Request(70, rows)], 4, 2, 64, 16)
        for context, rows in ((300, 17), (40, 9), (900, 17))
    ]
    static = make_step([Request(1000, 17), Request(1000, 17)], 4, 2, 64, 16)
    output = torch.zeros_like(static.query)

    run = partial(run_triton, static, static.query, output, 0.125, splits=4)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in steps:
        names = [field.name for field in fields(step.batch) if field.name != "max_rows"]
        pairs = [(getattr(static.batch, n), getattr(step.batch, n)) for n in names]
        pairs += [(getattr(static, n), getattr(step, n)) for n in INPUTS]
        for target, source in pairs:
            target[tuple(slice(n) for n in source.shape)] = source
        graph.replay()
        want = torch.zeros_like(step.query)
        run_reference(step, step.query, want, 0.125)
        got = output[: len(want)][step.tree_rows]
        torch.testing.assert_close(
            got, want[step.tree_rows], **TRITON_TOLERANCE[torch.float32]
        )
