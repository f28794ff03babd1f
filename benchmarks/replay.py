"""Speed at somebody else's acceptance: guesses are accepted by a table's odds.

The engine does all of its work, verification included, but which child a walk goes to
is drawn from published probabilities instead of read off the target's tokens. The text
is then nonsense; its length, the rows and the KV moves are what the table's model would
have had. This is for measuring only and lives outside the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_ppd.search.acceptance_table import AcceptanceStats


def replay_acceptance(stats: AcceptanceStats, seed: int = 0) -> None:
    """Make PPD's V1 runner in this process accept guesses as ``stats`` says."""
    from vllm_ppd.engine.v1 import sampling
    from vllm_ppd.trees.verify import TreeWalk, kv_moves

    rng = np.random.default_rng(seed)
    table = stats.acceptance  # [m, K]

    def walk(step: Any, tokens: np.ndarray, picked: np.ndarray) -> Any:
        tables, states = step.tables, step.states
        depths = tables.node_depths[states]  # [B, N]
        ranks = np.minimum(tables.node_ranks[states], table.shape[1] - 1)
        odds = table[np.maximum(depths, 1) - 1, ranks]
        walked = TreeWalk(step, tokens)
        going_on = True
        while going_on:
            children = (walked.parents == walked.nodes[:, None]) & (walked.tokens >= 0)
            reach = np.where(children, odds, 0.0).cumsum(axis=1)
            hit = (rng.random(len(states))[:, None] < reach) & children
            chosen = np.take_along_axis(
                walked.tokens, hit.argmax(axis=1)[:, None], axis=1
            )[:, 0]
            # A token that no child has ends the walk.
            end = picked[walked.logit_rows]
            end = np.where(np.isin(end, walked.tokens), 0, end)
            going_on = walked.descend(np.where(hit.any(axis=1), chosen, end))
        return walked, *kv_moves(step, walked)

    sampling.walk_greedy_cpu = walk  # type: ignore[assignment]


def replay_acceptance_v2(worker: Any, table: list[list[float]]) -> None:
    """The same for PPD's V2 runner, on the device; runs in the worker's process.

    Args:
        worker: unused; what vLLM's `collective_rpc` gives every function.
        table: [distance, rank] odds.
    """
    import torch

    from vllm_ppd.engine.v2.sampling import TreeSampler

    odds = np.asarray(table)
    stock = TreeSampler._sample
    kept: dict[str, Any] = {}

    def sample(self: Any, logits: Any, batch: Any) -> Any:
        sampled, processed = stock(self, logits, batch)
        trees = self._trees
        tables = trees.tables
        if not kept:
            kept["low"], kept["high"] = (
                torch.from_numpy(bound).to(logits.device, torch.float32)
                for bound in _intervals(tables, odds)
            )
            kept["node"] = torch.arange(tables.parents.shape[1], device=logits.device)
        count, node = batch.num_reqs, kept["node"]
        ids = trees.trees[:count]
        parents = tables.parents[ids].long()  # [B, N]
        nodes = torch.minimum(tables.num_nodes[ids], trees.num_rows[:count])
        # One draw per node decides which of its children is right, if any.
        draw = torch.rand(parents.shape, device=logits.device)
        draw = draw.gather(1, parents.clamp(min=0))
        hit = (kept["low"][ids] <= draw) & (draw < kept["high"][ids])
        hit &= (parents >= 0) & (node < nodes[:, None])
        rows = (trees.starts[:count, None] + node).clamp(max=len(batch.input_ids) - 1)
        # Where no child is right the token is one that next to no child has.
        picked = sampled.new_full((len(sampled) + 1,), 3)
        places = batch.cu_num_logits[:-1, None] + parents
        places = torch.where(hit, places, len(sampled))
        picked[places] = batch.input_ids[rows].to(picked.dtype)
        return picked[:-1], processed

    TreeSampler._sample = sample  # type: ignore[method-assign]


def _intervals(tables: Any, odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, N] bounds: a draw between them at a node's parent leads to the node."""
    parents = tables.parents.cpu().numpy()
    depths = np.maximum(tables.node_depths.cpu().numpy(), 1)
    ranks = np.minimum(tables.node_ranks.cpu().numpy(), odds.shape[1] - 1)
    chance = np.where(parents >= 0, odds[depths - 1, ranks], 0.0)
    node = np.arange(parents.shape[1])
    before = (parents[:, :, None] == parents[:, None, :]) & (node < node[:, None])
    low = np.einsum("sij,sj->si", before.astype(float), chance)
    return low, low + chance
