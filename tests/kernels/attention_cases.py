"""Steps for tests of tree attention on the GPU's cache layout.

Every slot that nobody wrote is nan, so that reading one shows in the output.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch

from tests.kernels.implementations import DEVICE
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.trees.layout import pack_mask


@dataclass
class Request:
    """One request of a step: `rows` of the tree after `plain` rows without one."""

    context: int
    rows: int
    plain: int = 0
    chain: bool = False


@dataclass
class Step:
    batch: TreeBatch
    query: torch.Tensor  # [T, H, D]
    keys: torch.Tensor  # [num_blocks, kv_heads, block_size, D]
    values: torch.Tensor
    tree_rows: torch.Tensor  # [T] bool


def prefill(tokens: int) -> Request:
    return Request(context=0, rows=0, plain=tokens)


PADDED = Request(context=0, rows=0)


def make_step(
    requests: list[Request],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    layout: str = "HND",
    words: int | None = None,
) -> Step:
    totals = [r.context + r.rows + r.plain for r in requests]
    needed = [-(-total // block_size) for total in totals]
    blocks = sum(needed) + 2
    order = random.sample(range(blocks), blocks)
    shape = (blocks, kv_heads, block_size, 2 * dim)
    if layout == "NHD":
        cache = torch.randn(blocks, block_size, kv_heads, 2 * dim).transpose(1, 2)
    else:
        cache = torch.randn(shape)
    max_rows = max(max(r.rows for r in requests), 1)
    words = words or -(-max_rows // 64)
    tokens = sum(r.rows + r.plain for r in requests) + 3  # and padding
    # No valid block behind a request's own: reading it would be a fault.
    table = torch.full((len(requests), max(needed) + 1), -1, dtype=torch.int32)
    ancestors = torch.full((tokens, words), -1)
    depths = torch.full((tokens,), 99, dtype=torch.int32)
    tree_rows = torch.zeros(tokens, dtype=torch.bool)
    starts, token = [], 0
    for r, request in enumerate(requests):
        owned = [order.pop() for _ in range(needed[r])]
        table[r, : needed[r]] = torch.tensor(owned, dtype=torch.int32)
        if owned:
            cache[owned[-1], :, (totals[r] - 1) % block_size + 1 :] = math.nan
        token += request.plain
        starts.append(token)
        rows = slice(token, token + request.rows)
        mask, depth = random_tree(request.rows, request.chain)
        packed = pack_mask(mask.reshape(request.rows, request.rows))
        ancestors[rows] = 0
        ancestors[rows, : packed.shape[1]] = torch.from_numpy(packed)
        depths[rows] = torch.tensor(depth, dtype=torch.int32)
        tree_rows[rows] = True
        token += request.rows
    cache[order] = math.nan
    cache = cache.to(DEVICE, cache_dtype or dtype)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    batch = TreeBatch(
        table.to(DEVICE),
        ints(starts),
        ints([r.rows for r in requests]),
        ints([r.context + r.plain for r in requests]),
        ancestors.to(DEVICE),
        depths.to(DEVICE),
        max_rows,
    )
    query = torch.randn(tokens, heads, dim).to(DEVICE, dtype)
    keys, values = cache.split(dim, dim=-1)
    return Step(batch, query, keys, values, tree_rows.to(DEVICE))


def random_tree(rows: int, chain: bool) -> tuple[np.ndarray, list[int]]:
    """Which rows each row sees, [rows, rows] bool, and every row's depth."""
    mask = np.eye(rows, dtype=bool)
    depths = [0] * rows
    for row in range(1, rows):
        parent = row - 1 if chain else random.randrange(row)
        mask[row] |= mask[parent]
        depths[row] = depths[parent] + 1
    return mask, depths
