"""Steps for tests of tree attention, in the cache layouts of GPUs and of the CPU.

Every slot that was not written is nan, so that reading one shows in the output.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch

from tests.kernels.implementations import DEVICE
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.trees.layout import pack_mask


@dataclass
class Request:
    """One request of a step: `rows` of the tree after `plain` rows without one."""

    context: int
    rows: int
    plain: int = 0
    parents: list[int] | None = None  # -1 for the root; None: a random tree


@dataclass
class Step:
    batch: TreeBatch
    query: torch.Tensor  # [T, H, D]
    cache: torch.Tensor  # [num_blocks, kv_heads, block_size, 2 * D]
    keys: torch.Tensor  # [num_blocks, kv_heads, block_size, D], views of the cache
    values: torch.Tensor
    tree_rows: torch.Tensor  # [T] bool
    parents: list[list[int]]  # of every request's rows
    slots: list[tuple[torch.Tensor, torch.Tensor]]  # [context + rows, kv_heads, D]


def chain(context: int, rows: int) -> Request:
    """The deepest tree: its rows differ most in what a window shows them."""
    return Request(context, rows, parents=list(range(-1, rows - 1)))


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
    layout: str = "HND",
    words: int | None = None,
    gap: int = 0,
) -> Step:
    """Requests in shuffled blocks; `gap` foreign rows before each."""
    device = "cpu" if layout == "CPU" else DEVICE
    totals = [r.context + r.rows + r.plain for r in requests]
    needed = [-(-total // block_size) for total in totals]
    blocks = sum(needed) + 2
    order = random.sample(range(blocks), blocks)
    cache = torch.randn(blocks, kv_heads, block_size, 2 * dim)
    max_rows = max(max(r.rows for r in requests), 1)
    words = words or -(-max_rows // 64)
    tokens = sum(gap + r.rows + r.plain for r in requests) + 3  # and padding
    # No valid block behind a request's own: reading it would be a fault.
    table = torch.full((len(requests), max(needed) + 1), -1, dtype=torch.int32)
    ancestors = torch.full((tokens, words), -1)
    depths = torch.full((tokens,), 99, dtype=torch.int32)
    tree_rows = torch.zeros(tokens, dtype=torch.bool)
    starts, token, trees, owned = [], 0, [], []
    for r, request in enumerate(requests):
        owned.append([order.pop() for _ in range(needed[r])])
        table[r, : needed[r]] = torch.tensor(owned[r], dtype=torch.int32)
        if owned[r]:
            cache[owned[r][-1], :, (totals[r] - 1) % block_size + 1 :] = math.nan
        token += gap + request.plain
        starts.append(token)
        rows = slice(token, token + request.rows)
        parents = request.parents
        if parents is None:
            parents = [-1, *(random.randrange(i) for i in range(1, request.rows))]
        trees.append(parents[: request.rows])
        mask = np.eye(request.rows, dtype=bool)
        for row, parent in enumerate(trees[r]):
            if parent >= 0:
                mask[row] |= mask[parent]
        packed = pack_mask(mask)
        ancestors[rows] = 0
        ancestors[rows, : packed.shape[1]] = torch.from_numpy(packed)
        depths[rows] = torch.from_numpy(mask.sum(1) - 1).int()
        tree_rows[rows] = True
        token += request.rows
    cache[order] = math.nan
    cache = cache.to(device, dtype)
    keys, values = cache.split(dim, dim=-1)
    slots = [
        tuple(
            part[blocks].transpose(1, 2).flatten(0, 1)[:total]
            for part in (keys, values)
        )
        for blocks, total in zip(owned, totals, strict=True)
    ]
    if layout == "NHD":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        keys, values = cache.split(dim, dim=-1)
    elif layout == "CPU":
        # In a (block, head) the keys, transposed, and then the values.
        parts = [keys.mT.flatten(2), values.flatten(2)]
        cache = torch.cat(parts, -1).view(cache.shape)
        keys, values = key_view(cache), value_view(cache)

    def ints(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    batch = TreeBatch(
        table.to(device),
        ints(starts),
        ints([r.rows for r in requests]),
        ints([r.context + r.plain for r in requests]),
        ancestors.to(device),
        depths.to(device),
        max_rows,
    )
    query = torch.randn(tokens, heads, dim).to(device, dtype)
    tree_rows = tree_rows.to(device)
    return Step(batch, query, cache, keys, values, tree_rows, trees, slots)


def oracle(
    step: Step, scale: float, softcap: float = 0.0, window: int = 0
) -> dict[int, torch.Tensor]:
    """Row by row, head by head, in float64 from the trees' parents: {token: [H, D]}."""
    expected = {}
    batch = step.batch
    for parents, slots, start, context in zip(
        step.parents,
        step.slots,
        batch.starts.tolist(),
        batch.context_lens.tolist(),
        strict=True,
    ):
        keys, values = (part.double().numpy() for part in slots)

        def path(row: int, parents: list[int] = parents) -> list[int]:
            return [*path(parents[row]), row] if row >= 0 else []

        for i in range(len(parents)):
            first = context + len(path(i)) - window if window > 0 else 0
            seen = list(range(max(first, 0), context))
            seen += [context + j for j in path(i) if context + len(path(j)) > first]
            rows = []
            for h, q in enumerate(step.query[start + i].double().numpy()):
                kv_head = h * keys.shape[1] // step.query.shape[1]
                scores = keys[seen, kv_head] @ q * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                rows.append(weights @ values[seen, kv_head] / weights.sum())
            expected[start + i] = torch.from_numpy(np.stack(rows))
    return expected
