"""vLLM's CPU cache layout, for the "vec" and "vec16" kernels, as strided views.

A layer's cache is [num_blocks, kv_heads, block_size, 2 * D], but only the first two
axes mean what they say: the block_size * 2 * D elements of a (block, head) hold the
keys transposed, [D, block_size], followed by the values, [block_size, D].
Other kernels of vLLM (AMX, NEON, ...) pack differently: probe before relying on it.
"""

from __future__ import annotations

import torch


def key_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Keys [num_blocks, kv_heads, block_size, D] of a layer's cache, no copy."""
    blocks, heads, block_size, _ = kv_cache.shape
    flat, half = _flat(kv_cache)
    keys = flat[:, :, :half].view(blocks, heads, -1, block_size)
    return keys.transpose(2, 3)


def value_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Values [num_blocks, kv_heads, block_size, D] of a layer's cache, no copy."""
    blocks, heads, block_size, _ = kv_cache.shape
    flat, half = _flat(kv_cache)
    return flat[:, :, half:].view(blocks, heads, block_size, -1)


def _flat(kv_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    block_size, width = kv_cache.shape[2:]
    if kv_cache.stride()[2:] != (width, 1) or width % 2:
        raise ValueError(
            "a layer's KV cache must be contiguous within (block, head), not "
            f"{list(kv_cache.shape)} with strides {kv_cache.stride()}"
        )
    return kv_cache.flatten(2), block_size * width // 2
