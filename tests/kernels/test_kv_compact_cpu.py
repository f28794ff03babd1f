"""CPU KV compaction: a literal path, a slot-by-slot oracle, bad input."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vllm_ppd.kernels.cpu import (
    CpuKVCompactor,
    key_view,
    kv_compact,
    load_library,
    value_view,
)
from vllm_ppd.kernels.kv_compact import kv_compact_reference


@pytest.fixture(params=["reference", "compiled"])
def compact(request, monkeypatch):
    """The compactor with either implementation, as compact(kv_caches, src, dst)."""
    if request.param == "reference":
        monkeypatch.setattr(kv_compact, "load_library", lambda: None)
    elif load_library() is None:
        pytest.skip("no C++ compiler")
    return lambda caches, src, dst: CpuKVCompactor(caches).run(src, dst)


def random_caches(layers, blocks, heads, block_size, dim, dtype=torch.float32):
    shape = (blocks, heads, block_size, 2 * dim)
    return [torch.randn(shape).to(dtype) for _ in range(layers)]


def oracle(caches, src, dst):
    """Element by element, from the layout's definition."""
    for cache in caches:
        _, heads, block_size, width = cache.shape
        dim = width // 2
        for a, b in zip(src, dst, strict=True):
            for h in range(heads):
                source = cache[a // block_size, h].view(-1)
                target = cache[b // block_size, h].view(-1)
                i, j = a % block_size, b % block_size
                for d in range(dim):
                    target[d * block_size + j] = source[d * block_size + i]
                    v = block_size * dim
                    target[v + j * dim + d] = source[v + i * dim + d]


def test_path_moves_next_to_the_context(compact):
    # Block size 2, D 1: each row below is [key 0, key 1, value 0, value 1].
    rows = [[10, 11, 20, 21], [12, 13, 22, 23], [14, 15, 24, 25]]
    cache = torch.tensor(rows, dtype=torch.float32).view(3, 1, 2, 2)
    # Slots 1 (root, stays), 3 -> 2, 5 -> 3: crosses blocks, overwrites a source.
    compact([cache], np.array([1, 3, 5]), np.array([1, 2, 3]))
    want = [[10, 11, 20, 21], [13, 15, 23, 25], [14, 15, 24, 25]]
    assert cache.view(3, 4).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("heads", "block_size", "dim"), [(1, 16, 16), (3, 32, 20), (2, 128, 8)]
)
def test_random_moves(compact, dtype, heads, block_size, dim):
    torch.manual_seed(1)
    rng = random.Random(1)
    caches = random_caches(3, 8, heads, block_size, dim, dtype)
    src, dst = [], []
    for request in range(4):  # two blocks each
        base = request * 2 * block_size + rng.randrange(block_size)
        picked = sorted(rng.sample(range(block_size), 6))
        src += [base + p for p in picked]
        dst += [base + d for d in range(6)]
    want = [cache.clone() for cache in caches]
    oracle(want, src, dst)
    compact(caches, np.array(src), np.array(dst))
    for got, expected in zip(caches, want, strict=True):
        assert torch.equal(got, expected)


def test_many_moves_over_many_layers_in_parallel(compact):
    caches = random_caches(12, 20, 2, 16, 64, torch.bfloat16)
    # A layer may sit inside a buffer that holds several.
    buffer = torch.zeros(20, 2, 2, 16, 128).bfloat16()
    caches.append(buffer[:, 1])
    src, dst = torch.arange(16, 160), torch.arange(0, 144)
    want = [cache.clone() for cache in caches]
    views = [view(cache) for cache in want for view in (key_view, value_view)]
    kv_compact_reference(views, src, dst)
    compact(caches, src, dst)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_nothing_to_move(compact):
    caches = random_caches(1, 2, 1, 16, 16)
    want = caches[0].clone()
    compact(caches, np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    assert torch.equal(caches[0], want)


@pytest.mark.parametrize(("src", "dst"), [(32, 0), (0, 32), (-1, 0), (0, -1)])
def test_a_slot_outside_the_cache_is_an_error(compact, src, dst):
    caches = random_caches(1, 2, 1, 16, 16)
    want = caches[0].clone()
    with pytest.raises(IndexError, match=f"{src} -> {dst}"):
        compact(caches, np.array([3, src]), np.array([2, dst]))
    assert torch.equal(caches[0], want)


def test_slots_must_be_contiguous_int64():
    compactor = CpuKVCompactor(random_caches(1, 2, 1, 16, 16))
    good = np.array([1, 2])
    with pytest.raises(ValueError, match="int32"):
        compactor.run(good.astype(np.int32), good)
    with pytest.raises(ValueError, match="contiguous"):
        compactor.run(np.arange(4)[::2], good)
    with pytest.raises(ValueError, match="2 sources but 1"):
        compactor.run(good, good[:1])
