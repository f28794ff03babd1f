"""Draft tokens of a tree in Triton: one program per node, one for the other rows.

The scores are those of `vllm_ppd.trees.drafting.fill_trees`: each prompt row's best
tokens are ranked again below every node, with the bigram gains of that node's own
token.

A node's token depends on its parent's. Instead of waiting for another program, each
one computes the tokens from the root down to its node again, which is a few levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.bigram import BigramTensors


class DeviceDraftInputs(NamedTuple):
    """What draft tokens depend on; the device form of `trees.drafting.DraftInputs`.

    Axes: B requests, M >= 1 prompt tokens, V tokens, P best tokens of a prompt row.
    Rows at or past a request's num_prompted may hold anything.
    """

    num_prompted: torch.Tensor  # int [B]: prompt rows with logits
    logits: torch.Tensor  # float [B, M, V]
    pool: torch.Tensor  # int64 [B, M, P]: best tokens, best first
    scores: torch.Tensor  # float [B, M, P]: their logits
    roots: torch.Tensor  # int [B]: last sampled token
    ngrams: torch.Tensor  # int [B, L]: n-gram draft, -1 padded


@triton.jit
def _ranked_child(
    rank,
    parent,  # token, int64
    excluded,  # token that is not ranked, or -1
    prompted,
    weight,
    pool_ptr,  # at the prompt token's row; likewise the next two
    scores_ptr,
    logits_ptr,
    pool_size,
    bigram_ids_ptr,  # int64 [V, n]
    gains_ptr,  # float32 [V, n]
    floor_ptr,  # float32 [V]
    num_listed,  # n
    TABLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The token of rank `rank` below `parent`; 0 if none is listed."""
    place = tl.arange(0, BLOCK_P)
    in_pool = place < tl.where(prompted, pool_size, 0)
    ids = tl.load(pool_ptr + place, mask=in_pool, other=-1)
    scores = tl.load(scores_ptr + place, mask=in_pool, other=0).to(tl.float32)
    scores = tl.where(in_pool, scores, float("-inf"))
    index = tl.arange(0, BLOCK_L)
    listed = tl.full([BLOCK_L], -2, dtype=tl.int64)
    more = tl.full([BLOCK_L], float("-inf"), dtype=tl.float32)
    if TABLE:
        in_list = index < num_listed
        at = parent * num_listed + index
        listed = tl.load(bigram_ids_ptr + at, mask=in_list, other=-2)
        gains = tl.load(gains_ptr + at, mask=in_list, other=0.0)
        floor = tl.load(floor_ptr + parent)
        same = (ids[:, None] == listed[None, :]).to(tl.int32)
        gain = tl.sum(tl.where(same != 0, gains[None, :], 0.0), axis=1)
        gain = tl.where(tl.max(same, axis=1) > 0, gain, floor)
        scores = scores + weight * gain
        has_logit = index < tl.where(prompted, num_listed, 0)
        logits = tl.load(logits_ptr + listed, mask=has_logit, other=0.0).to(tl.float32)
        more = tl.where(has_logit, logits + weight * gains, -index.to(tl.float32))
        more = tl.where(in_list & (tl.max(same, axis=0) == 0), more, float("-inf"))
        more = tl.where(listed == excluded, float("-inf"), more)
    scores = tl.where(ids == excluded, float("-inf"), scores)

    token = excluded * 0
    for _ in range(rank + 1):
        best, best_more = tl.max(scores, axis=0), tl.max(more, axis=0)
        # Of equal scores the first wins, and the pool before the table.
        first = tl.min(tl.where(scores == best, place, BLOCK_P), axis=0)
        second = tl.min(tl.where(more == best_more, index, BLOCK_L), axis=0)
        from_pool = best >= best_more
        first = tl.where(from_pool, first, BLOCK_P)
        second = tl.where(from_pool, BLOCK_L, second)
        token = tl.sum(tl.where(place == first, ids, 0), axis=0)
        token += tl.sum(tl.where(index == second, listed, 0), axis=0)
        token = tl.where(tl.maximum(best, best_more) == float("-inf"), 0, token)
        scores = tl.where(place == first, float("-inf"), scores)
        more = tl.where(index == second, float("-inf"), more)
    return token


@triton.jit
def _fill_tree_kernel(
    trees_ptr,  # [B]
    num_prompted_ptr,  # [B]
    logits_ptr,  # [B, M, V]
    pool_ptr,  # int64 [B, M, P]
    scores_ptr,  # [B, M, P]
    roots_ptr,  # [B]
    ngrams_ptr,  # [B, L]
    bigram_ids_ptr,  # int64 [V, n], or None
    gains_ptr,  # float32 [V, n], or None
    floor_ptr,  # float32 [V], or None
    weights_ptr,  # float32 [>= M]
    num_nodes_ptr,  # [S]
    num_rows_ptr,  # [S]
    depths_ptr,  # [S, N]
    ranks_ptr,  # [S, N]
    on_ngram_ptr,  # [S, N]
    soft_ids_ptr,  # [S, Q]
    ancestors_ptr,  # int64 [S, Q, WORDS]
    drafts_ptr,  # [B, K]
    num_drafts,  # K
    drafts_stride,
    row_width,  # Q
    node_width,  # N
    num_prompts,  # M
    logits_stride,  # of a prompt token's row
    pool_size,  # P
    num_listed,  # n
    ngram_length,  # L
    TABLE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # powers of two, at least K, N, P, n
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    tree = tl.load(trees_ptr + request).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + tree)
    drafts_ptr += request * drafts_stride
    if node == 0:
        row = tl.arange(0, BLOCK_K) + 1
        in_tree = row < tl.minimum(tl.load(num_rows_ptr + tree), row_width)
        soft_ptr = soft_ids_ptr + tree * row_width + row
        soft = tl.load(soft_ptr, mask=in_tree, other=0)
        written = (row >= num_nodes) & (row <= num_drafts)
        tl.store(drafts_ptr + row - 1, soft, mask=written)
        return
    if node >= tl.minimum(num_nodes, num_drafts + 1):
        return

    index = tl.arange(0, BLOCK_N)
    is_node = index < num_nodes
    words_ptr = ancestors_ptr + (tree * row_width + node) * WORDS
    words = tl.load(words_ptr + index // 64, mask=is_node, other=0)
    on_path = ((words >> (index % 64).to(tl.int64)) & 1) != 0
    at = tree * node_width + index
    depths = tl.load(depths_ptr + at, mask=is_node, other=0)
    ranks = tl.load(ranks_ptr + at, mask=is_node, other=0)
    on_ngram = tl.load(on_ngram_ptr + at, mask=is_node, other=0)
    depth = tl.sum(tl.where(index == node, depths, 0), axis=0)
    num_prompted = tl.load(num_prompted_ptr + request)
    token = tl.load(roots_ptr + request).to(tl.int64)
    parent = node * 0
    for level in range(1, depth + 1):
        at_level = on_path & (depths == level)
        rank = tl.sum(tl.where(at_level, ranks, 0), axis=0)
        follows = tl.sum(tl.where(index == parent, on_ngram, 0), axis=0)
        follows = (follows > 0) & (level <= ngram_length)
        ngram_ptr = ngrams_ptr + request * ngram_length + level - 1
        ngram = tl.load(ngram_ptr, mask=follows, other=-1).to(tl.int64)
        rank -= (ngram >= 0).to(tl.int32)
        prompted = level <= num_prompted
        row = request * num_prompts + tl.minimum(level, num_prompts) - 1
        weight = tl.load(weights_ptr + level - 1, mask=prompted, other=0.0)
        ranked = _ranked_child(
            rank, token, ngram, prompted, weight,
            pool_ptr + row * pool_size, scores_ptr + row * pool_size,
            logits_ptr + row * logits_stride, pool_size,
            bigram_ids_ptr, gains_ptr, floor_ptr, num_listed,
            TABLE, BLOCK_P, BLOCK_L,
        )  # fmt: skip
        token = tl.where(rank < 0, ngram, ranked)
        parent = tl.sum(tl.where(at_level, index, 0), axis=0)
    tl.store(drafts_ptr + node - 1, token)


def fill_tree(
    tables: DeviceTables,
    trees: torch.Tensor,  # int [B]: tree id of each request's next step
    inputs: DeviceDraftInputs,
    bigram: BigramTensors | None,
    weights: torch.Tensor,  # float32 [>= M]: of the bigram gains, per prompt token
    drafts: torch.Tensor,  # int [B, K]: written; K >= 1 rows after the root
) -> None:
    """Write the rows after the root of each request's tree.

    Prompt rows get their soft ids. Columns past the tree's end get 0, and a
    tree that is longer than K is cut, which leaves a valid smaller one. A node for
    which no token is listed gets token 0. All tensors are contiguous, except that rows
    of logits may be slices of longer ones.
    """
    batch, num_drafts = drafts.shape
    if batch == 0:
        return
    pool_size = inputs.pool.shape[2]
    num_listed = 1 if bigram is None else bigram.ids.shape[1]
    nodes = tables.parents.shape[1]
    _fill_tree_kernel[(batch, nodes)](
        trees,
        *inputs,
        *(bigram or (None, None, None)),
        weights,
        *(tables.num_nodes, tables.num_rows, tables.node_depths, tables.node_ranks),
        *(tables.on_ngram, tables.soft_ids, tables.ancestors),
        *(drafts, num_drafts, drafts.stride(0)),
        *(tables.soft_ids.shape[1], nodes),
        *(inputs.logits.shape[1], inputs.logits.stride(1)),
        *(pool_size, num_listed, inputs.ngrams.shape[1]),
        TABLE=bigram is not None,
        WORDS=tables.ancestors.shape[2],
        BLOCK_K=triton.next_power_of_2(num_drafts),
        BLOCK_N=triton.next_power_of_2(nodes),
        BLOCK_P=triton.next_power_of_2(pool_size),
        BLOCK_L=triton.next_power_of_2(num_listed),
        num_warps=2,
    )
