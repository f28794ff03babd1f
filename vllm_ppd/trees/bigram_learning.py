"""A bigram table that goes on learning while it serves.

Verification computes the target's logits at every node, so each accepted token u comes
with the target's own distribution of the next token: an observation of weight one for
row u of the table. A table that starts empty is useful after some thousand of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_ppd.trees.bigram import SMOOTHING, BigramTable
from vllm_ppd.trees.drafting import BigramTensors

__all__ = ["LISTED", "MOST", "OnlineBigram", "learn_bigrams"]

# Likeliest next tokens that an observation adds to its row.
LISTED = 8
# Observations that a row remembers: older ones fade, so that it follows the traffic.
MOST = 2048.0


@dataclass(frozen=True, eq=False)
class OnlineBigram:
    """A bigram table with the counts behind it; V tokens, n bigram each.

    All tensors lie on one device and change in place, so whoever fills trees from
    `table` sees what was learnt. Memory: 12 n + 12 bytes per token, 16 n where ids are
    int64.
    """

    table: BigramTensors
    """What trees are filled from; ids int32 or int64."""
    counts: torch.Tensor
    """float32 [V, n], how much was seen of each listed successor."""
    totals: torch.Tensor
    """float32 [V], how much was seen of each token."""
    base: torch.Tensor
    """float32 [V], how much was seen of each token as a successor of any."""
    base_total: torch.Tensor
    """float64 [1], the sum of `base`."""

    @classmethod
    def of(cls, table: BigramTable, device: torch.device | str = "cpu"):
        """Start from a table; its own arrays stay as they are."""
        totals = np.minimum(SMOOTHING * (np.exp(-table.floor) - 1), MOST)
        seen = totals[:, None] + SMOOTHING
        lifts = np.exp(table.gains) * seen - SMOOTHING
        counts = np.maximum(lifts, 0) * table.base[table.ids]
        # A table of nothing knows base rates as well as one sighting each tells.
        weight = max(float(totals.sum()), float(table.vocab_size))
        base = table.base * weight

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, dtype=torch.float32, device=device)

        ids = torch.tensor(table.ids, device=device)
        return cls(
            BigramTensors(
                ids if ids.device.type == "cpu" else ids.long(),
                tensor(table.gains),
                tensor(table.floor),
            ),
            counts=tensor(counts),
            totals=tensor(totals),
            base=tensor(base),
            base_total=torch.tensor([base.sum()], dtype=torch.float64, device=device),
        )

    def as_table(self, like: BigramTable) -> BigramTable:
        """A table whose arrays are these tensors, on CPU; weights from another one."""
        ids, gains, floor = (tensor.numpy() for tensor in self.table)
        return BigramTable(ids, gains, floor, like.weights, like.base)


def learn_bigrams(
    live: OnlineBigram, tokens: torch.Tensor, logits: torch.Tensor
) -> None:
    """Add observations; fixed shapes, nothing is read on the host.

    Of observations of the same token in one call the first counts for its row, all
    count for the base rates.

    Args:
        live: changed in place.
        tokens: int [R] the tokens after which the target was asked.
        logits: float32 [R, V] what it said.
    """
    ids, gains, floor = live.table
    # Of logits that are no numbers nothing is learnt.
    chances = logits.softmax(dim=1).nan_to_num(0.0)
    live.base.add_(chances.sum(0))
    live.base_total.add_(len(tokens))
    added, new = chances.topk(min(LISTED, chances.shape[1]), dim=1)

    tokens = tokens.long()
    total = live.totals[tokens] + 1
    fading = torch.where(total > MOST, 0.5, 1.0)
    total = total * fading
    own = ids[tokens].long()
    counts = live.counts[tokens] * fading[:, None]
    same = own[:, :, None] == new[:, None, :]  # [R, n, k]
    counts = counts + (same * added[:, None, :]).sum(2)
    added = torch.where(same.any(1), -1.0, added)
    # Listed ones first among equals, then by rank: both sorts are stable.
    counts, order = torch.cat([counts, added], 1).sort(
        dim=1, descending=True, stable=True
    )
    kept = torch.cat([own, new], 1).gather(1, order)[:, : own.shape[1]]
    counts = counts[:, : own.shape[1]]
    vocabulary = len(live.base)
    base = (live.base[kept] + 1) / (live.base_total.float() + vocabulary)
    seen = total + SMOOTHING
    gain = ((counts / base + SMOOTHING) / seen[:, None]).log()
    low = (SMOOTHING / seen).log()

    # A row that an earlier observation changes is written with that one's values.
    first = (tokens[:, None] == tokens[None, :]).int().argmax(1)
    ids[tokens] = kept[first].to(ids.dtype)
    gains[tokens] = gain[first]
    floor[tokens] = low[first]
    live.counts[tokens] = counts[first]
    live.totals[tokens] = total[first]
