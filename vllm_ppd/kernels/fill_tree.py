"""Draft tokens of a tree on the device: the torch reference.

The scores are those of `vllm_ppd.trees.drafting.fill_trees`: each prompt row's best
tokens are ranked again below every node, with the bigram gains of that node's own
token. Nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.bigram import BigramTensors

__all__ = ["DeviceDraftInputs", "fill_tree_reference"]


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


def fill_tree_reference(
    tables: DeviceTables,
    trees: torch.Tensor,  # int [B]: tree id of each request's next step
    inputs: DeviceDraftInputs,
    bigram: BigramTensors | None,
    weights: torch.Tensor,  # float32 [>= M]: of the bigram gains, per prompt token
    drafts: torch.Tensor,  # int [B, K]: written; K >= 1 rows after the root
    filler: int = 0,
) -> None:
    """Write the rows after the root of each request's tree.

    Prompt rows get their soft ids. Columns past the tree's end get `filler`, and a
    tree that is longer than K is cut, which leaves a valid smaller one. A node for
    which no token is listed gets token 0.
    """
    trees = trees.long()
    parents = tables.parents[trees].long()  # [B, N]
    is_draft = parents >= 0
    parents = parents.clamp(min=0)
    depths, ranks = tables.node_depths[trees], tables.node_ranks[trees]
    on_ngram = tables.on_ngram[trees].gather(1, parents) > 0
    tokens = torch.zeros_like(parents)
    tokens[:, 0] = inputs.roots
    for depth in range(1, tables.max_depth + 1):
        ngram = torch.full_like(parents, -1)
        if depth <= inputs.ngrams.shape[1]:
            given = inputs.ngrams[:, depth - 1, None].long()
            ngram = torch.where(on_ngram, given, ngram)
        rank = ranks.long() - (ngram >= 0).long()
        ids, scores = _score(inputs, depth, tokens.gather(1, parents), bigram, weights)
        scores = scores.masked_fill(ids == ngram[..., None], -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order.indices)
        ids = ids.masked_fill(order.values == -torch.inf, 0)
        ids = torch.nn.functional.pad(ids, (0, 1))
        place = rank.clamp(0, ids.shape[-1] - 1)
        ranked = ids.gather(-1, place[..., None])[..., 0]
        ranked = torch.where(rank < 0, ngram, ranked)
        tokens = torch.where(is_draft & (depths == depth), ranked, tokens)

    # Draft tokens, prompt rows' soft ids, and `filler` past the tree's end.
    rows, nodes = tables.soft_ids.shape[1], parents.shape[1]
    ids = tables.soft_ids[trees]  # [B, Q]
    ids[:, :nodes] = torch.where(is_draft, tokens, ids[:, :nodes])
    row = torch.arange(rows, device=trees.device)
    ids = torch.where(row < tables.num_rows[trees][:, None], ids, filler)
    count = min(rows - 1, drafts.shape[1])
    drafts.fill_(filler)
    drafts[:, :count] = ids[:, 1 : count + 1].to(drafts.dtype)


def _score(
    inputs: DeviceDraftInputs,
    depth: int,
    parents: torch.Tensor,  # int64 [B, N]: token of each node's parent
    bigram: BigramTensors | None,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Possible tokens of every node if it were at `depth`: ids and scores [B, N, E]."""
    batch, nodes = parents.shape
    prompted = (depth <= inputs.num_prompted)[:, None, None]
    row = min(depth, inputs.logits.shape[1]) - 1
    pool = inputs.pool[:, row, None].long().expand(batch, nodes, -1)
    scores = inputs.scores[:, row, None].float().expand(batch, nodes, -1)
    if bigram is None:
        return pool, scores.masked_fill(~prompted, -torch.inf)
    listed, gains = bigram.ids[parents], bigram.gains[parents]  # [B, N, n]
    same = pool[..., :, None] == listed[..., None, :]
    gain = (same * gains[..., None, :]).sum(-1)
    floor = bigram.floor[parents][..., None]
    scores = scores + weights[row] * torch.where(same.any(-1), gain, floor)
    logits = inputs.logits[:, row].float().gather(1, listed.flatten(1))
    more = logits.view_as(gains) + weights[row] * gains
    more = more.masked_fill(same.any(-2), -torch.inf)
    # Without a prompt row the table's own order counts.
    place = -torch.arange(listed.shape[-1], device=listed.device).float()
    more = torch.where(prompted, more, place)
    scores = scores.masked_fill(~prompted, -torch.inf)
    return torch.cat([pool, listed], -1), torch.cat([scores, more], -1)
