"""KV compaction along accepted paths: slot by slot as the oracle, on every layout."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.implementations import DEVICE, kernels, needs_triton
from vllm_ppd.kernels.cpu import kv_compact
from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.kernels.cpu.kv_compact import CpuKVCompactor
from vllm_ppd.kernels.cpu.layout import key_view, value_view


@pytest.fixture(params=["reference", "compiled"])
def compact_cpu(request, monkeypatch):
    """The CPU's compactor with either implementation, as compact(caches, src, dst)."""
    if request.param == "reference":
        monkeypatch.setattr(kv_compact, "load_library", lambda: None)
    elif load_library() is None:
        pytest.skip("no C++ compiler")
    return lambda caches, *moves: CpuKVCompactor(caches).run(
        *(torch.as_tensor(slots, dtype=torch.int64) for slots in moves)
    )


def random_bits(shape, dtype, device=DEVICE):
    """Any bit pattern, also such as are no numbers."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype).to(device)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).cpu()


def same(caches, others):
    pairs = zip(caches, others, strict=True)
    return all(torch.equal(bits(one), bits(other)) for one, other in pairs)


def cache_of(layout, blocks, heads, size, width, dtype):
    """[blocks, heads, size, width] in one of the physical layouts that vLLM uses."""
    if layout == "HND":
        return random_bits((blocks, heads, size, width), dtype)
    if layout == "NHD":
        return random_bits((blocks, size, heads, width), dtype).transpose(1, 2)
    # Keys with the head's elements apart, as the CPU backend keeps them.
    return random_bits((blocks, heads, width, size), dtype).transpose(2, 3)


def move(caches, src, dst):
    for cache in caches:
        size = cache.shape[2]
        for a, b in zip(src, dst, strict=True):
            cache[b // size, :, b % size] = cache[a // size, :, a % size].clone()


def check(caches, slots, starts, paths, lengths):
    want = [cache.clone() for cache in caches]
    for start, path, length in zip(starts, paths, lengths, strict=True):
        src = [slots[start + row] for row in path[:length]]
        move(want, src, [slots[start + depth] for depth in range(length)])
    ints = [
        torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for values in (starts, paths, lengths)
    ]
    slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    kernels.kv_compact.KVCompactor(caches).run(slots, *ints)
    assert same(caches, want)


# ---- along paths, on the device -----------------------------------------------------


@needs_triton
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
def test_random_paths(layout, dtype, heads, block_size, width):
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
    check(caches, [*slots, -1, -1], starts, paths, lengths)


@needs_triton
def test_caches_of_different_shapes_and_types():
    random.seed(0)
    caches = [
        cache_of("HND", 4, 2, 16, 64, torch.bfloat16),
        cache_of("HND", 4, 4, 16, 32, torch.bfloat16),
        cache_of("HND", 4, 2, 16, 64, torch.uint8),
        # A layer inside a buffer that holds several.
        random_bits((4, 2, 2, 16, 64), torch.bfloat16)[:, 1],
    ]
    slots = random.sample(range(64), 20)
    check(caches, slots, [0, 10], [[0, 2, 3], [0, 1, 9]], [3, 3])
    # Nothing moves.
    check(caches, slots, [0, 10], [[0, 1, 2], [0, 3, 0]], [3, 1])


# ---- between slots, in the CPU backend's caches -------------------------------------


def cpu_caches(layers, blocks, heads, block_size, dim, dtype=torch.float32):
    shape = (blocks, heads, block_size, 2 * dim)
    return [random_bits(shape, dtype, "cpu") for _ in range(layers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("heads", "block_size", "dim"), [(1, 16, 16), (3, 32, 20), (2, 128, 8)]
)
def test_random_moves(compact_cpu, dtype, heads, block_size, dim):
    random.seed(1)
    caches = cpu_caches(3, 8, heads, block_size, dim, dtype)
    src, dst = [], []
    for request in range(4):  # two blocks each
        base = request * 2 * block_size + random.randrange(block_size)
        picked = sorted(random.sample(range(block_size), 6))
        src += [base + p for p in picked]
        dst += [base + d for d in range(6)]
    want = [cache.clone() for cache in caches]
    # By the layout's definition: per block and head D rows of keys, then the values.
    flat = [cache.view(8, heads, -1) for cache in want]
    half = block_size * dim
    keys = [f[..., :half].view(8, heads, dim, -1).transpose(2, 3) for f in flat]
    move(keys, src, dst)
    move([f[..., half:].view(8, heads, -1, dim) for f in flat], src, dst)
    compact_cpu(caches, src, dst)
    assert same(caches, want)


def test_many_moves_over_many_layers_in_parallel(compact_cpu):
    caches = cpu_caches(12, 20, 2, 16, 64, torch.bfloat16)
    # A layer may sit inside a buffer that holds several.
    buffer = torch.zeros(20, 2, 2, 16, 128).bfloat16()
    caches.append(buffer[:, 1])
    src, dst = torch.arange(16, 160), torch.arange(0, 144)
    want = [cache.clone() for cache in caches]
    views = [view(cache) for cache in want for view in (key_view, value_view)]
    kv_compact.kv_compact_reference(views, src, dst)
    compact_cpu(caches, src, dst)
    assert same(caches, want)


@pytest.mark.parametrize(("src", "dst"), [(32, 0), (0, 32), (-1, 0), (0, -1)])
def test_a_slot_outside_the_cache_is_an_error(compact_cpu, src, dst):
    (cache,) = cpu_caches(1, 2, 1, 16, 16)
    want = cache.clone()
    with pytest.raises(IndexError, match=f"{src} -> {dst}"):
        compact_cpu([cache], [3, src], [2, dst])
    compact_cpu([cache], [], [])
    assert torch.equal(bits(cache), bits(want))


def test_slots_must_be_contiguous_int64():
    compactor = CpuKVCompactor(cpu_caches(1, 2, 1, 16, 16))
    good = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="int32"):
        compactor.run(good.int(), good)
    with pytest.raises(ValueError, match="contiguous"):
        compactor.run(torch.arange(4)[::2], good)
    with pytest.raises(ValueError, match="2 sources but 1"):
        compactor.run(good, good[:1])
