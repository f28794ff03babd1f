"""Draft tokens of the next step: prompt logits, the bigram table and n-gram drafts.

The children of a node are ranked by the logits of the prompt row for their depth, made
conditional on the node's own token by the bigram table:

    score(c | u) = logit_d(c) + weight_d * gain(c | u)

over the prompt row's best tokens and the tokens that the table lists for u. Deeper than
prompt rows reach, the table alone ranks them. With an n-gram match, the n-gram draft
comes first: its tokens are rank 0 below the root and below each other. Draft tokens
change the speed alone; the output is the target's, whatever they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.layout import TreeTables

# Best tokens of a prompt row that are ranked again with the bigram table.
POOL = 32


@dataclass(frozen=True)
class DraftInputs:
    """The sources of a batch's draft tokens. B requests, V tokens.

    Attributes:
        num_prompted: [B] how deep the prompt rows of the last step reach.
        logits: float32 [sum of num_prompted, V] of those rows, request by request.
        roots: [B] last sampled token of each request.
        ngrams: [B, L] n-gram draft of each request, -1 padded.
    """

    num_prompted: np.ndarray
    logits: torch.Tensor
    roots: np.ndarray
    ngrams: np.ndarray


def rank_children(
    logits: torch.Tensor | None,
    parents: torch.Tensor,
    bigram: BigramTensors | None,
    weight: torch.Tensor | float,
    count: int,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best children of nodes, best first.

    Args:
        logits: float32 [P, V] of the prompt row for the children's depth; None where
            no prompt row reaches.
        parents: [P] token of each node.
        bigram: the table; without it and without logits there are no children.
        weight: [P, 1] or one number, how much of the gain to add.
        count: how many children.
        excluded: [P] a token that is not to be among them, or -1.

    Returns:
        int64 [P, count] tokens, -1 where there are no more.
    """
    none = torch.full((len(parents), count), -1, device=parents.device)
    if logits is None:
        if bigram is None:
            return none
        ids = bigram.ids[parents].long()
        # Falling from 0, so that the table's order stays.
        scores = -torch.arange(ids.shape[1], device=ids.device).float().expand_as(ids)
    else:
        best = logits.topk(min(max(POOL, count + 1), logits.shape[1]))
        ids, scores = best.indices, best.values
        if bigram is not None:
            own, gains = bigram.ids[parents].long(), bigram.gains[parents]
            same = ids[:, :, None] == own[:, None, :]  # [P, pool, n]
            listed = (same * gains[:, None, :]).sum(2)
            floor = bigram.floor[parents][:, None]
            scores = scores + weight * torch.where(same.any(2), listed, floor)
            own_scores = logits.gather(1, own) + weight * gains
            own_scores = own_scores.masked_fill(same.any(1), -torch.inf)
            ids = torch.cat([ids, own], 1)
            scores = torch.cat([scores, own_scores], 1)
    if excluded is not None:
        scores = scores.masked_fill(ids == excluded[:, None], -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order.indices).masked_fill(order.values == -torch.inf, -1)
    return torch.cat([ids, none], 1)[:, :count]


def fill_trees(
    tables: TreeTables,
    trees: np.ndarray,
    inputs: DraftInputs,
    bigram: BigramTensors | None,
    weights: np.ndarray,
) -> np.ndarray:
    """Ids of all rows after the root of each request's tree.

    Args:
        tables: the trees.
        trees: [B] tree id of each request's next step.
        inputs: prompt logits and n-gram drafts.
        bigram: the bigram table, if there is one.
        weights: [m] how much of its gain to add to prompt token d's logits.

    Returns:
        int64 [B, Q - 1], draft tokens and ids of prompt rows; rows past a tree's end
        hold 0. A draft token without any source is 0.
    """
    ids = tables.soft_ids[trees]
    device = inputs.logits.device
    width = tables.parents.shape[1]
    tokens = np.zeros((len(trees), width), dtype=np.int64)
    tokens[:, 0] = inputs.roots
    depths = tables.node_depths[trees]
    is_draft = tables.parents[trees] >= 0
    firsts = np.cumsum(inputs.num_prompted) - inputs.num_prompted
    for depth in range(1, tables.max_depth + 1):
        request, node = np.nonzero(is_draft & (depths == depth))
        if not len(request):
            break
        tree = trees[request]
        parent = tables.parents[tree, node]
        rank = tables.node_ranks[tree, node]
        ngram = np.full(len(request), -1)
        if depth <= inputs.ngrams.shape[1]:
            on_ngram = tables.on_ngram[tree, parent]
            ngram = np.where(on_ngram, inputs.ngrams[request, depth - 1], -1)
        # The n-gram draft's token is rank 0; the others count on from 1.
        rank = rank - (ngram >= 0)
        filled = np.where(rank < 0, ngram, 0)
        for prompted in (True, False):
            index = np.flatnonzero(
                (rank >= 0) & ((inputs.num_prompted[request] >= depth) == prompted)
            )
            if not len(index):
                continue
            rows = torch.from_numpy(firsts[request[index]] + depth - 1).to(device)
            ranked = rank_children(
                inputs.logits[rows] if prompted else None,
                torch.from_numpy(tokens[request[index], parent[index]]).to(device),
                bigram,
                float(weights[depth - 1]) if prompted else 0.0,
                int(rank[index].max()) + 1,
                torch.from_numpy(ngram[index]).to(device),
            )
            picked = ranked.cpu().numpy()[np.arange(len(index)), rank[index]]
            filled[index] = np.maximum(picked, 0)
        tokens[request, node] = filled
    ids[:, :width] = np.where(is_draft, tokens, ids[:, :width])
    return ids[:, 1:]
