"""DraftInputs for the next step: the tokens of a tree's candidates.

The children of a node are ranked by what the prompt row for their depth says, made
conditional on the node's own token by the bigram table:

    score(c | u) = logit_d(c) + weight_d * gain(c | u)

over the prompt row's best tokens and tokens that the bigram table lists for it. Deeper than prompt rows reach,
the table alone ranks them. Where the request's last tokens have an earlier match, its
continuation is the chain: it comes first below the root and below its own nodes.
DraftInputs only cost or save time; whatever they are, the output is the target's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.layout import TreeTables

__all__ = ["DraftInputs", "BigramTensors", "fill_drafts", "fill_trees", "rank_children"]

# Best tokens of a prompt row that are ranked again with the bigram table.
POOL = 32


class BigramTensors(NamedTuple):
    """A bigram table on a device."""

    ids: torch.Tensor
    """int64 [V, n]."""
    gains: torch.Tensor
    """float32 [V, n]."""
    floor: torch.Tensor
    """float32 [V]."""

    @classmethod
    def of(cls, table: BigramTable, device: torch.device | str = "cpu"):
        return cls(
            torch.from_numpy(table.ids).long().to(device),
            torch.from_numpy(table.gains).to(device),
            torch.from_numpy(table.floor).to(device),
        )


@dataclass(frozen=True)
class DraftInputs:
    """What a batch knows about its next tokens. B requests, V tokens.

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
        bigram: the table; without one, and without logits, nothing is known.
        weight: [P, 1] or one number, how much of the gain to add.
        count: children wanted.
        excluded: [P] a token that is no candidate, or -1.

    Returns:
        int64 [P, count] tokens, -1 where there are no more.
    """
    none = torch.full((len(parents), count), -1, device=parents.device)
    if logits is None:
        if bigram is None:
            return none
        ids = bigram.ids[parents]
        # Falling from 0, so that the table's order stays.
        scores = -torch.arange(ids.shape[1], device=ids.device).float().expand_as(ids)
    else:
        best = logits.topk(min(max(POOL, count + 1), logits.shape[1]))
        ids, scores = best.indices, best.values
        if bigram is not None:
            own, gains = bigram.ids[parents], bigram.gains[parents]
            same = ids[:, :, None] == own[:, None, :]  # [P, pool, n]
            listed = (same * gains[:, None, :]).sum(2)
            floor = bigram.floor[parents][:, None]
            scores = scores + weight * torch.where(same.any(2), listed, floor)
            more = logits.gather(1, own) + weight * gains
            more = more.masked_fill(same.any(1), -torch.inf)
            ids = torch.cat([ids, own], 1)
            scores = torch.cat([scores, more], 1)
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
        inputs: what is known.
        bigram: the bigram table, if there is one.
        weights: [m] how much of its gain to add to prompt token d's logits.

    Returns:
        int64 [B, Q - 1], tokens of candidates and ids of prompt rows; rows past a
        tree's end hold 0. A candidate about which nothing is known gets token 0.
    """
    ids = tables.soft_ids[trees]
    device = inputs.logits.device
    width = tables.parents.shape[1]
    tokens = np.zeros((len(trees), width), dtype=np.int64)
    tokens[:, 0] = inputs.roots
    depths = tables.node_depths[trees]
    candidates = tables.parents[trees] >= 0
    firsts = np.cumsum(inputs.num_prompted) - inputs.num_prompted
    for depth in range(1, tables.max_depth + 1):
        request, node = np.nonzero(candidates & (depths == depth))
        if not len(request):
            break
        tree = trees[request]
        parent = tables.parents[tree, node]
        rank = tables.node_ranks[tree, node]
        chain = np.full(len(request), -1)
        if depth <= inputs.ngrams.shape[1]:
            on = tables.on_ngram[tree, parent]
            chain = np.where(on, inputs.ngrams[request, depth - 1], -1)
        rank = rank - (chain >= 0)
        found = np.where(rank < 0, chain, 0)
        for prompted in (True, False):
            some = np.flatnonzero(
                (rank >= 0) & ((inputs.num_prompted[request] >= depth) == prompted)
            )
            if not len(some):
                continue
            rows = torch.from_numpy(firsts[request[some]] + depth - 1).to(device)
            ranked = rank_children(
                inputs.logits[rows] if prompted else None,
                torch.from_numpy(tokens[request[some], parent[some]]).to(device),
                bigram,
                float(weights[depth - 1]) if prompted else 0.0,
                int(rank[some].max()) + 1,
                torch.from_numpy(chain[some]).to(device),
            )
            picked = ranked.cpu().numpy()[np.arange(len(some)), rank[some]]
            found[some] = np.maximum(picked, 0)
        tokens[request, node] = found
    ids[:, :width] = np.where(candidates, tokens, ids[:, :width])
    return ids[:, 1:]


def fill_drafts(
    tables: TreeTables, states: np.ndarray, counts: np.ndarray, best: np.ndarray
) -> list[list[int]]:
    """The same from the prompt rows' best tokens alone, as lists of drafts.

    The candidate at depth ``d`` and rank ``r`` is the rank-``r`` token of prompt
    token ``d``'s output; prompt rows get their soft ids.

    Args:
        states: [B] next state of each request.
        counts: [B] prompt tokens whose outputs are in ``best``, 0 where a request
            has none; otherwise equal to its state.
        best: [sum of counts, k] best token ids of each prompt token, best first,
            request by request.

    Returns:
        one list per request; the rows of its tree in order.
    """
    ids = tables.soft_ids[states]
    width = tables.parents.shape[1]
    # Depth 1 of request b is row firsts[b] of best.
    firsts = np.cumsum(counts) - counts
    rows = firsts[:, None] + tables.node_depths[states] - 1
    is_candidate = tables.parents[states] >= 0
    if is_candidate.any():
        tokens = best[np.where(is_candidate, rows, 0), tables.node_ranks[states]]
        ids[:, :width] = np.where(is_candidate, tokens, ids[:, :width])
    return [
        row[1:end]
        for row, end in zip(ids.tolist(), tables.num_rows[states], strict=True)
    ]
