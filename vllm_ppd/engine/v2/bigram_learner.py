"""Feeds the bigram table with what verification computes anyway, on the device.

Ranks of a tensor-parallel group see the same logits, and learn the same from them in
the same step.
"""

from __future__ import annotations

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_ppd.kernels.triton.tree_walk import Walk
from vllm_ppd.trees.bigram import OnlineBigram, learn_bigrams

# Steps between observations, and about how many nodes one takes in. As many small
# kernels are launched for few nodes as for many: more nodes seldom, then.
EVERY, _NODES = 8, 32


class BigramLearner:
    """The learning of one worker.

    Args:
        online: the table, which changes in place.
        max_rows: of any request in a step.
    """

    def __init__(self, online: OnlineBigram, max_rows: int):
        self._online = online
        self._levels = torch.arange(max_rows, device=online.base.device)
        self._steps = 0

    def after_walk(self, walk: Walk, logits: torch.Tensor, batch: InputBatch) -> None:
        """Learn from visited nodes: their token, and the target's next tokens.

        Args:
            walk: where verification ended.
            logits: [L, V] of all nodes, as the target gave them.
            batch: the step's, whose rows with logits are nodes.
        """
        self._steps += 1
        if self._steps % EVERY:
            return
        num_reqs, length = walk.paths.shape
        # In turn, if there are more.
        share = max(1, _NODES // length)
        first = self._steps // EVERY * share % num_reqs
        turn = slice(first, first + share)
        # As many nodes of each request: a short path once more from its root. Such
        # nodes count twice for base rates, and once for what follows them.
        visited = walk.num_sampled[turn, None].clamp(min=1)
        levels = self._levels[:length] % visited
        nodes = walk.paths[turn].gather(1, levels)
        rows = (batch.cu_num_logits[:-1][turn, None] + nodes).flatten()
        tokens = batch.input_ids[batch.logits_indices[rows]]
        learn_bigrams(self._online, tokens, logits[rows].float())
