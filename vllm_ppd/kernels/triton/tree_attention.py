"""Tree attention over a paged KV cache: shapes, checks and launches.

Everything about the step is read from device memory, and what is launched depends only
on the batch's size and row bound: a captured CUDA graph stays right when the trees in
the buffers change.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.triton.attend import attend_kernel
from vllm_ppd.kernels.triton.splits import join_splits_kernel

LOG2_E = 1.4426950408889634
_MAX_SPLITS = 32
# Rows times heads of a group that one program of the second kernel joins.
_JOIN_M = 16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Triton's interpreter multiplies bfloat16 as if it were integers.
_INTERPRETED = not isinstance(attend_kernel, triton.JITFunction)


class _Shape(NamedTuple):
    """How the work is cut: constants of a model, a row bound and a batch size."""

    block_m: int
    row_tiles: int
    tile: int
    padded_head: int
    splits: int
    num_warps: int
    num_stages: int


@functools.cache
def _choose_shape(
    requests: int,
    max_rows: int,
    kv_heads: int,
    group: int,
    head_size: int,
    item_size: int,
    splits: int | None,
    device: torch.device,
) -> _Shape:
    padded = triton.next_power_of_2(max(head_size, 16))
    multiprocessors, hopper = 1, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        multiprocessors = properties.multi_processor_count
        hopper = properties.major in (9, 10)  # 228 KB of shared memory, and wgmma
    # These sizes keep everything in registers; float32 takes no tensor cores.
    max_m, tile, num_warps = 128, 64, 8
    if device.type == "cuda" and item_size == 4:
        max_m, tile = 16, 16
    elif padded > 128:
        max_m, tile = 64 if hopper else 32, max(16, 8192 // padded)
    members = max_rows * group
    block_m = max(16, min(max_m, triton.next_power_of_2(members)))

    def splits_of(block_m: int) -> int:
        # Two programs for each multiprocessor, in one wave.
        tiles = triton.cdiv(members, block_m)
        splits = 2 * multiprocessors // (requests * tiles * kv_heads)
        return 1 << max(0, min(splits, _MAX_SPLITS).bit_length() - 1)

    if hopper and item_size < 4 and padded == 128 and members > 64:
        # Grouped heads: measured, benchmarks/gpu_kernels.py --sweep.
        if splits_of(block_m) > 1:
            block_m = 64
        else:
            tile = 128
    if item_size < 4 and block_m <= 64 and padded <= 128:
        num_warps = 4
    row_tiles = triton.cdiv(members, block_m)
    if splits is None:
        splits = splits_of(block_m)
    num_stages = 3 if hopper else 2
    return _Shape(block_m, row_tiles, tile, padded, splits, num_warps, num_stages)


def tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    batch: TreeBatch,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    num_splits: int | None = None,
) -> None:
    """As `vllm_ppd.kernels.tree_attention.tree_attention_reference`.

    The products are taken in the output's type and summed in float32. ``num_splits``,
    a power of two, overrides the number of splits that the batch and the GPU suggest.

    Raises:
        ValueError: shapes, types or layouts that the kernel cannot read.
    """
    _check(query, key_cache, value_cache, output, batch)
    requests = batch.block_table.shape[0]
    if requests == 0:
        return
    _, heads, head_size = query.shape
    kv_heads, block_size = key_cache.shape[1:3]
    max_rows = batch.max_rows or 64 * batch.ancestors.shape[1]
    group = heads // kv_heads
    sizes = (requests, max_rows, kv_heads, group, head_size, output.element_size())
    shape = _choose_shape(*sizes, num_splits, query.device)
    splits, padded = shape.splits, shape.padded_head
    partial = tops = totals = None
    if splits > 1:
        count = requests * max_rows * heads * splits
        space = query.new_empty(count * (padded + 2), dtype=torch.float32)
        partial, tops, totals = space.split([count * padded, count, count])
    has_cap = softcap > 0
    constants = {
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "WINDOW": max(window, 0),
        "SPLITS": splits,
        "TILE": shape.tile,
        "D": padded,
    }
    attend_kernel[(requests * shape.row_tiles, kv_heads, splits)](
        *(query, key_cache, value_cache, output, partial, tops, totals),
        *(batch.block_table, batch.starts, batch.num_rows, batch.context_lens),
        *(batch.ancestors, batch.depths),
        2 * LOG2_E * scale / softcap if has_cap else LOG2_E * scale,
        LOG2_E * softcap,
        max_rows,
        shape.row_tiles,
        batch.block_table.stride(0),
        *query.stride()[:2],
        *output.stride()[:2],
        *key_cache.stride(),
        *value_cache.stride(),
        **constants,
        BLOCK_SIZE=block_size,
        WORDS=batch.ancestors.shape[1],
        SOFTCAP=has_cap,
        M=shape.block_m,
        WIDE=_INTERPRETED,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if splits > 1:
        row_tiles = triton.cdiv(max_rows * group, _JOIN_M)
        join_splits_kernel[(requests * row_tiles, kv_heads)](
            *(partial, tops, totals, output),
            *(batch.starts, batch.num_rows, batch.context_lens),
            *(max_rows, row_tiles),
            *output.stride()[:2],
            **constants,
            M=_JOIN_M,
            num_warps=4,
        )


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    batch: TreeBatch,
) -> None:
    if (
        query.stride(2) == output.stride(2) == batch.block_table.stride(1) == 1
        and output.shape == query.shape
        and output.dtype in _FLOATS
        and key_cache.dtype == value_cache.dtype == query.dtype
        and key_cache.shape == value_cache.shape
        and key_cache.shape[3] == query.shape[2]
        and query.shape[1] % key_cache.shape[1] == 0
        and batch.ancestors.is_contiguous()
    ):
        return
    tensors = {
        "query": query,
        "key cache": key_cache,
        "value cache": value_cache,
        "output": output,
        "block table": batch.block_table,
        "ancestors": batch.ancestors,
    }
    described = ", ".join(
        f"{name} {tensor.dtype} {list(tensor.shape)} strides {tensor.stride()}"
        for name, tensor in tensors.items()
    )
    raise ValueError(f"tree attention cannot work on these tensors: {described}")
