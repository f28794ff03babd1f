"""Triton's tree attention against the torch reference: odd shapes, mixed batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.kernels.attention_cases import (
    PADDED,
    Request,
    chain,
    make_step,
    prefill,
)
from tests.kernels.implementations import DEVICE, needs_triton
from vllm_ppd.kernels.tree_attention import tree_attention_reference

pytestmark = needs_triton
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

# Both sum in float32 and round the result once, half a unit in the last place each;
# compiled, 16-bit weights are rounded before they meet the values, too.
TOLERANCE = {
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}
UNTOUCHED = 7.0


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    torch.manual_seed(0)


def attend(*args, **options):
    from vllm_ppd.kernels.triton.tree_attention import tree_attention

    tree_attention(*args, **options)


def check(step, splits=1, softcap=0.0, window=0, **scales):
    scale = step.query.shape[2] ** -0.5
    want = torch.full_like(step.query, UNTOUCHED)
    got = want.clone()
    inputs = step.query, step.keys, step.values
    options = {"scale": scale, "softcap": softcap, "window": window, **scales}
    tree_attention_reference(*inputs, want, step.batch, **options)
    attend(*inputs, got, step.batch, **options, num_splits=splits)
    assert want[step.tree_rows].isfinite().all()
    assert (got[~step.tree_rows] == UNTOUCHED).all()
    torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])
    return got


MIXED = [
    prefill(5),
    Request(context=130, rows=17),
    PADDED,
    Request(context=5, rows=1),  # plain decoding
    Request(context=0, rows=9),
    Request(context=63, rows=2, plain=3),
    PADDED,
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "dtype", "splits"),
    [
        (4, 2, 64, 16, torch.float32, 1),
        (1, 1, 80, 32, torch.bfloat16, 4),
        (8, 1, 128, 128, torch.float16, 1),
        (3, 1, 96, 16, torch.float32, 4),
        (5, 1, 256, 64, torch.bfloat16, 4),
        (3, 3, 20, 16, torch.float32, 2),
    ],
)
def test_mixed_batches(heads, kv_heads, dim, block_size, dtype, splits):
    check(make_step(MIXED, heads, kv_heads, dim, block_size, dtype), splits)


@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129])
@pytest.mark.parametrize("context", [0, 1, 63, 64])
def test_rows_and_contexts(rows, context):
    step = make_step([Request(context, rows)], 1, 1, 16, 16)
    check(step, splits=1 + context % 2)


@pytest.mark.parametrize("splits", [1, 16])
def test_eight_thousand_tokens(splits):
    step = make_step([Request(8100, 64), PADDED, Request(50, 3)], 1, 1, 64, 16)
    check(step, splits)


@pytest.mark.parametrize(
    ("window", "softcap"),
    [(1, 0.0), (2, 0.7), (20, 0.0), (130, 0.7), (1000, 0.0), (0, 0.7)],
)
def test_window_and_soft_cap(window, softcap):
    requests = [
        Request(0, 20),
        Request(3, 70),
        Request(280, 6),
        chain(100, 30),
    ]
    check(make_step(requests, 2, 1, 32, 16), 2, softcap, window)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_large_scores_do_not_overflow():
    step = make_step([Request(30, 4)], 1, 1, 16, 16)
    step.keys.mul_(1000)
    check(step, softcap=30.0)
    # A GPU fuses the scaling of scores with the subtraction of the largest one, as
    # FlashAttention does: from 1e9 on what is left of its rounding would overflow.
    step.keys.mul_(1000)
    check(step)


def test_blocks_before_the_window_are_not_read():
    step = make_step([Request(200, 5)], 1, 1, 16, 16)
    want = check(step, window=40)
    # vLLM frees them: their entries point at nothing.
    step.batch.block_table[0, : (200 - 40) // 16] = -1
    got = torch.full_like(want, UNTOUCHED)
    attend(step.query, step.keys, step.values, got, step.batch, 0.25, window=40)
    torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("per_head", [False, True])
def test_8_bit_cache(dtype, per_head):
    step = make_step([Request(70, 9), PADDED], 4, 2, 64, 16, torch.bfloat16, dtype)
    k_scale, v_scale = (
        torch.rand(2 if per_head else 1, device=DEVICE) + 0.1 for _ in range(2)
    )
    for splits in (1, 2):
        check(step, splits, k_scale=k_scale, v_scale=v_scale)


def test_8_bit_query():
    dtype = torch.float8_e4m3fn
    step = make_step([Request(70, 9)], 2, 1, 64, 16, torch.bfloat16, dtype)
    scales = {
        name: torch.tensor([value], device=DEVICE)
        for name, value in (("q_scale", 0.5), ("k_scale", 2.0), ("v_scale", 0.25))
    }
    want = torch.zeros_like(step.query)
    got = want.clone()
    inputs = step.query.to(dtype), step.keys, step.values
    tree_attention_reference(*inputs, want, step.batch, 0.125, **scales)
    attend(*inputs, got, step.batch, 0.125, **scales)
    torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])


def test_two_mask_words_for_a_small_tree():
    check(make_step([Request(10, 12)], 1, 1, 16, 16, words=2))


def test_rows_that_may_be_more_than_any_request_has():
    step = make_step([Request(40, 12), PADDED], 2, 1, 16, 16)
    want = check(step, splits=2)
    for bound in (None, 40):
        step.batch = replace(step.batch, max_rows=bound)
        assert torch.equal(check(step, splits=2), want)


@pytest.mark.parametrize(("block_m", "tile"), [(16, 16), (32, 32), (64, 128)])
def test_other_tile_sizes(monkeypatch, block_m, tile):
    """GPUs use smaller tiles where registers are short, and larger ones at leisure."""
    from vllm_ppd.kernels.triton import tree_attention as module

    choose = module._choose_shape

    def other(requests, max_rows, kv_heads, group, *args):
        shape = choose(requests, max_rows, kv_heads, group, *args)
        tiles = -(-max_rows * group // block_m)
        return shape._replace(block_m=block_m, row_tiles=tiles, tile=tile)

    monkeypatch.setattr(module, "_choose_shape", other)
    # Trees within a tile, at its start, across its middle and across two tiles.
    requests = [Request(40, 13), Request(0, 5), Request(60, 9), Request(120, 70)]
    check(make_step(requests, 3, 1, 32, 16), 2)
    check(make_step(requests, 3, 1, 32, 16), 1, window=25)


@pytest.mark.parametrize("layout", ["NHD", "HND", "buffer"])
def test_strided_tensors(layout):
    """vLLM hands out slices of a fused projection, and layers inside one buffer."""
    step = make_step([Request(50, 9)], 4, 2, 32, 16, torch.bfloat16, layout=layout)
    want = check(step)
    fused = torch.randn(len(step.query), 10, 32).to(step.query)
    fused[:, 3:7] = step.query
    keys, values = step.keys, step.values
    if layout == "buffer":
        keys, values = (
            torch.stack([cache, cache], 1)[:, 1] for cache in (keys, values)
        )
    got = torch.full_like(fused, UNTOUCHED)
    attend(fused[:, 3:7], keys, values, got[:, 2:6], step.batch, 32**-0.5)
    assert torch.equal(got[:, 2:6], want)
    assert got[:, :2].eq(UNTOUCHED).all() and got[:, 6:].eq(UNTOUCHED).all()


def test_keys_whose_elements_are_apart():
    """The CPU backend's blocks hold keys transposed."""
    step = make_step([Request(50, 9)], 2, 2, 32, 16)
    want = check(step)
    step.keys = step.keys.mT.contiguous().mT
    assert torch.equal(check(step), want)


def test_tensors_that_do_not_fit_together_are_an_error():
    step = make_step([Request(5, 3)], 4, 2, 16, 16)
    output = torch.zeros_like(step.query)
    for query, keys in (
        (step.query.mT.contiguous().mT, step.keys),
        (step.query[:, :3], step.keys),
        (step.query, step.keys[..., :8]),
    ):
        with pytest.raises(ValueError, match=r"query torch\.float32 \[6, "):
            attend(query, keys, step.values, output[:, : query.shape[1]], step.batch, 1)


@needs_gpu
@pytest.mark.gpu
def test_a_captured_graph_follows_its_buffers():
    steps = [
        make_step([Request(context, rows), Request(70, rows)], 4, 2, 64, 16)
        for context, rows in ((300, 17), (40, 9), (900, 17))
    ]
    static = make_step([Request(1000, 17), Request(1000, 17)], 4, 2, 64, 16)
    output = torch.zeros_like(static.query)

    def run():
        inputs = static.query, static.keys, static.values
        attend(*inputs, output, static.batch, 0.125, num_splits=4)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in steps:
        for name in ("starts", "num_rows", "context_lens", "block_table"):
            source = getattr(step.batch, name)
            target = getattr(static.batch, name)
            target[tuple(slice(n) for n in source.shape)] = source
        for name in ("ancestors", "depths"):
            source = getattr(step.batch, name)
            getattr(static.batch, name)[: len(source)] = source
        static.query[: len(step.query)] = step.query
        static.keys[: len(step.keys)] = step.keys
        static.values[: len(step.values)] = step.values
        graph.replay()
        want = torch.zeros_like(step.query)
        inputs = step.query, step.keys, step.values
        tree_attention_reference(*inputs, want, step.batch, 0.125)
        got = output[: len(want)][step.tree_rows]
        torch.testing.assert_close(
            got, want[step.tree_rows], **TOLERANCE[torch.float32]
        )
