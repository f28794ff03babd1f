"""Tree attention over a paged KV cache: the step's inputs and the torch reference.

A decode step feeds each tree request q rows: the root, draft tokens (parents before
children) and prompt rows. Row i of a request attends to the request's whole context
and to the in-step rows on its path in the tree, itself included:

    out[i] = softmax_j(cap * tanh(scale * q_i . k_j / cap)) v_j
    over slots j < context_len, and slots context_len + j with bit j of ancestors[i]

The rows' keys and values are in the cache already, at linear slots context_len + j.
Under a sliding window a row sees keys at positions > p - window only, where p is
context_len + depth: rows of the same depth share a position, whatever their slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class TreeBatch:
    """The tree requests of one step: R requests among T tokens, W mask words per row.

    Requests in other stages (prefill, plain decoding) are not listed, or have no rows;
    their tokens are neither read nor written. Under a captured CUDA graph the tensors
    are buffers that later steps write, and `max_rows` bounds them all.
    """

    block_table: torch.Tensor  # int32 [R, max_blocks]: cache blocks of each request
    starts: torch.Tensor  # int [R]: token index of each request's root row
    num_rows: torch.Tensor  # int [R]: rows q; 0 for a padded request, or without a tree
    context_lens: torch.Tensor  # int [R]: cached tokens before the root
    ancestors: torch.Tensor  # int64 [T, W]: bit j (word j // 64): sees in-step row j
    depths: torch.Tensor  # int [T]: position of a row = context_len + depth
    max_rows: int | None = None  # no request has more rows; None: 64 * W

    def __post_init__(self) -> None:
        requests, tokens = len(self.block_table), len(self.ancestors)
        words = self.ancestors.shape[-1]
        width = self.block_table.shape[-1]
        for name, shape, dtypes in (
            ("block_table", (requests, width), (torch.int32,)),
            ("starts", (requests,), _INTEGERS),
            ("num_rows", (requests,), _INTEGERS),
            ("context_lens", (requests,), _INTEGERS),
            ("ancestors", (tokens, words), (torch.int64,)),
            ("depths", (tokens,), _INTEGERS),
        ):
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype not in dtypes:
                names = " or ".join(str(dtype).split(".")[1] for dtype in dtypes)
                raise ValueError(
                    f"{name} must be {names} {list(shape)}, not "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )


def tree_attention_reference(
    query: torch.Tensor,  # [T, H, D]
    key_cache: torch.Tensor,  # [num_blocks, kv_heads, block_size, D], any strides
    value_cache: torch.Tensor,  # [num_blocks, kv_heads, block_size, D], any strides
    output: torch.Tensor,  # [T, H, D], written at the tree rows only
    batch: TreeBatch,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> None:
    """Write the tree rows' attention into `output`; computed in float32.

    `softcap` <= 0 and `window` <= 0 (in tokens) mean none. Works on any device and with
    any strided layout; it gathers the blocks each request can see.
    """
    heads, dim = query.shape[1:]
    kv_heads, block_size = key_cache.shape[1:3]
    rows_of = batch.num_rows.tolist()
    for r, (start, q, context) in enumerate(
        zip(batch.starts.tolist(), rows_of, batch.context_lens.tolist(), strict=True)
    ):
        if q == 0:
            continue
        rows = slice(start, start + q)
        depths = batch.depths[rows].long()  # [q]
        visible = _visible(batch.ancestors[rows], depths, context, window)
        total = context + q
        blocks = batch.block_table[r, : -(-total // block_size)].long()
        keys, values = (
            # [kv_heads, 1, total, D]
            cache[blocks]
            .float()
            .transpose(0, 1)
            .reshape(kv_heads, 1, -1, dim)[:, :, :total]
            for cache in (key_cache, value_cache)
        )
        grouped = query[rows].reshape(q, kv_heads, heads // kv_heads, dim)
        queries = grouped.float().permute(1, 2, 0, 3)
        scores = queries @ keys.mT * scale  # [kv_heads, group, q, total]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        # A row that sees nothing (its own bit unset, no context) yields zeros.
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        # Hidden slots may hold anything, even nan, which 0 * nan would let through.
        seen = visible.any(0)[:, None]
        mixed = weights @ values.masked_fill(~seen, 0.0)
        output[rows] = mixed.permute(2, 0, 1, 3).reshape(q, heads, dim).to(output.dtype)


def _visible(
    ancestors: torch.Tensor,  # int64 [q, W]
    depths: torch.Tensor,  # int64 [q]
    context: int,
    window: int,
) -> torch.Tensor:
    """Which slots each row sees: bool [q, context + q]."""
    q = ancestors.shape[0]
    if q > 64 * ancestors.shape[1]:
        raise ValueError(f"{q} rows need more mask words than {ancestors.shape[1]}")
    index = torch.arange(q, device=ancestors.device)
    tree = (ancestors[:, index // 64] >> (index % 64)) & 1  # [q, q]
    visible = torch.cat([tree.new_ones(q, context), tree], dim=1).bool()
    if window > 0:
        slots = torch.arange(context, device=ancestors.device)
        positions = torch.cat([slots, context + depths])  # [context + q]
        visible &= positions[None, :] > (context + depths - window)[:, None]
    return visible
