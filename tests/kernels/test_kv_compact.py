"""KV compaction along accepted paths: slot by slot as the oracle, on GPU layouts."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS
from vllm_ppd.kernels.kv_compact import compact_paths_reference


@pytest.fixture(params=IMPLEMENTATIONS)
def compact(request):
    """Either implementation, called as compact(caches, slots, starts, paths, n)."""
    if request.param == "reference":
        return compact_paths_reference
    from vllm_ppd.kernels.triton.kv_compact import KVCompactor

    return lambda caches, *args: KVCompactor(caches).run(*args)


def random_bits(shape, dtype):
    """Any bit pattern, also such as are no numbers."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype).to(DEVICE)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).cpu()


def cache_of(layout, blocks, heads, size, width, dtype):
    """[blocks, heads, size, width] in one of the physical layouts that vLLM uses."""
    if layout == "HND":
        return random_bits((blocks, heads, size, width), dtype)
    if layout == "NHD":
        return random_bits((blocks, size, heads, width), dtype).transpose(1, 2)
    # Keys with the head's elements apart, as the CPU backend keeps them.
    return random_bits((blocks, heads, width, size), dtype).transpose(2, 3)


def oracle(caches, slots, starts, paths, lengths):
    for cache in caches:
        size = cache.shape[2]
        for start, path, length in zip(starts, paths, lengths, strict=True):
            for depth, row in enumerate(path[:length]):
                a, b = slots[start + row], slots[start + depth]
                cache[b // size, :, b % size] = cache[a // size, :, a % size].clone()


def check(compact, caches, slots, starts, paths, lengths):
    want = [cache.clone() for cache in caches]
    oracle(want, slots, starts, paths, lengths)
    ints = [
        torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for values in (starts, paths, lengths)
    ]
    slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    compact(caches, slots, *ints)
    for got, expected in zip(caches, want, strict=True):
        assert torch.equal(bits(got), bits(expected))


def test_a_path_by_hand(compact):
    # One head, block size 2, width 1: slot s holds s. Rows lie at slots 3, 4, 5, ...
    cache = torch.arange(12.0, device=DEVICE).view(6, 1, 2, 1)
    ints = [torch.tensor(v, device=DEVICE) for v in ([0], [[0, 2, 3, 5]], [4])]
    compact([cache], torch.arange(3, 12, device=DEVICE), *ints)
    assert cache.flatten().tolist() == [0, 1, 2, 3, 5, 6, 8, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("layout", ["HND", "NHD", "transposed"])
@pytest.mark.parametrize(
    ("dtype", "heads", "block_size", "width"),
    [
        (torch.bfloat16, 1, 16, 128),
        (torch.float16, 8, 32, 160),
        (torch.float32, 3, 16, 512),
        (torch.float8_e4m3fn, 5, 128, 192),
        # Not a multiple of 16 bytes: per-head scales may stand behind the values.
        (torch.uint8, 2, 64, 132),
        (torch.uint8, 2, 16, 13),
    ],
)
def test_random_paths(compact, layout, dtype, heads, block_size, width):
    random.seed(f"{layout} {heads}")
    torch.manual_seed(heads)
    blocks = 12
    caches = [
        cache_of(layout, blocks, heads, block_size, width, dtype) for _ in range(3)
    ]
    free = random.sample(range(blocks * block_size), blocks * block_size)
    slots, starts, paths, lengths = [], [], [], []
    for rows in (1, 9, 40, 30):
        slots.append(free.pop())  # another request's row
        starts.append(len(slots))
        slots += [free.pop() for _ in range(rows)]
        length = random.randint(1, min(rows, 5))
        path = [0, *sorted(random.sample(range(1, rows), length - 1))]
        paths.append(path + [0] * (5 - length))
        lengths.append(length)
    # Padded requests, whose starts are past the end, and slots of padded rows.
    starts += [len(slots)] * 2
    paths += [[0] * 5] * 2
    lengths += [0, 0]
    check(compact, caches, [*slots, -1, -1], starts, paths, lengths)


def test_caches_of_different_shapes_and_types(compact):
    random.seed(0)
    caches = [
        cache_of("HND", 4, 2, 16, 64, torch.bfloat16),
        cache_of("HND", 4, 4, 16, 32, torch.bfloat16),
        cache_of("HND", 4, 2, 16, 64, torch.uint8),
        # A layer inside a buffer that holds several.
        random_bits((4, 2, 2, 16, 64), torch.bfloat16)[:, 1],
    ]
    slots = random.sample(range(64), 20)
    check(compact, caches, slots, [0, 10], [[0, 2, 3], [0, 1, 9]], [3, 3])


def test_nothing_moves(compact):
    caches = [cache_of("HND", 2, 1, 16, 32, torch.float32)]
    check(compact, caches, list(range(8)), [0, 4], [[0, 1, 2], [0, 3, 0]], [3, 1])
