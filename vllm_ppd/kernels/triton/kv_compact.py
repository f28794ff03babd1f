"""KV compaction in all layers with one launch, over a table of the caches' addresses.

A program moves the rows of one request in one layer, for a group of heads, in the
order of the path. It is free of races: on a path ``paths[d] >= d``, rising with d, so
what is read at d was never written before, and what is written at d was read earlier,
if at all, by the same program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Bytes that a program keeps in registers per row: heads beyond go to other programs.
_PROGRAM_BYTES = 16384
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _kv_compact_kernel(
    addresses_ptr,  # int64 [layers]
    slots_ptr,  # int64 [T]
    starts_ptr,  # [B]
    paths_ptr,  # [B, D + 1]
    lengths_ptr,  # [B]
    element_ptr,  # any tensor of the caches' type
    path_width,  # D + 1
    num_heads,
    width,  # elements of a head's row
    block_size,
    stride_block,
    stride_head,
    stride_slot,
    stride_element,
    ALIGNED: tl.constexpr,  # addresses and strides are multiples of 16 bytes
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    length = tl.load(lengths_ptr + request)
    if length < 2:
        return
    address = tl.load(addresses_ptr + tl.program_id(1))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    cache = address.to(element_ptr.dtype)
    start = tl.load(starts_ptr + request)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    element = tl.arange(0, BLOCK)
    mask = (head < num_heads)[:, None] & (element < width)[None, :]
    inner = head.to(tl.int64)[:, None] * stride_head + element[None, :] * stride_element
    for depth in range(1, length):
        row = tl.load(paths_ptr + request * path_width + depth)
        if row != depth:
            source = tl.load(slots_ptr + start + row)
            target = tl.load(slots_ptr + start + depth)
            from_block, from_slot = source // block_size, source % block_size
            to_block, to_slot = target // block_size, target % block_size
            source = from_block * stride_block + from_slot * stride_slot
            target = to_block * stride_block + to_slot * stride_slot
            values = tl.load(cache + source + inner, mask=mask)
            tl.store(cache + target + inner, values, mask=mask)


class _Layers:
    """Caches of equal shape, strides and element size: one launch."""

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        _, self.heads, self.block_size, self.width = caches[0].shape
        self.strides = caches[0].stride()
        size = caches[0].element_size()
        addresses = [cache.data_ptr() for cache in caches]
        *outer, last = self.strides
        # Strides of axes of length 1 say nothing and do not count.
        lengths = caches[0].shape[:-1]
        strides = [s * size for s, n in zip(outer, lengths, strict=True) if n > 1]
        bytes_ = [*addresses, self.width * size, *strides]
        if last == 1 and all(number % 8 == 0 for number in bytes_) and size < 8:
            # A copy does not care what its elements are; larger ones are faster.
            factor = 8 // size
            self.width //= factor
            self.strides = (*(stride // factor for stride in outer), 1)
            size = 8
        self.aligned = last == 1 and all(number % 16 == 0 for number in bytes_)
        self.block = triton.next_power_of_2(self.width)
        self.heads_per_program = min(
            triton.next_power_of_2(self.heads),
            max(1, _PROGRAM_BYTES // (self.block * size)),
        )
        device = caches[0].device
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.element = torch.empty(1, dtype=_INTEGERS[size], device=device)


class KVCompactor:
    """Moves accepted rows in the given caches; built once, when they are allocated.

    Args:
        caches: each [num_blocks, kv_heads, block_size, width], any strides and element
            type; all share one numbering of slots (one KV cache group). vLLM's GPU
            caches hold keys and values side by side in one row.

    Attributes:
        views: the caches.
    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        self.views = list(caches)  # keeps the memory alive
        groups: dict[tuple, list[torch.Tensor]] = {}
        for cache in caches:
            aligned = cache.data_ptr() % 16 == 0
            key = (cache.shape, cache.stride(), cache.element_size(), aligned)
            groups.setdefault(key, []).append(cache)
        self._groups = [_Layers(group) for group in groups.values()]

    def run(
        self,
        slots: torch.Tensor,  # int64 [T]: cache slot of every row of the step
        starts: torch.Tensor,  # int [B]: row of each root
        paths: torch.Tensor,  # int [B, D + 1]: accepted rows of each tree, root first
        lengths: torch.Tensor,  # int [B]: accepted rows; 0 for a padded request
    ) -> None:
        """Copy the slot of accepted row ``paths[b, d]`` to that of row ``d``."""
        batch, path_width = paths.shape
        if batch == 0:
            return
        for layers in self._groups:
            programs = triton.cdiv(layers.heads, layers.heads_per_program)
            _kv_compact_kernel[(batch, len(layers.addresses), programs)](
                *(layers.addresses, slots, starts, paths, lengths, layers.element),
                *(path_width, layers.heads, layers.width, layers.block_size),
                *layers.strides,
                ALIGNED=layers.aligned,
                HEADS=layers.heads_per_program,
                BLOCK=layers.block,
                num_warps=4,
            )
