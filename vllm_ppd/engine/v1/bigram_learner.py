"""Feeds the bigram table with what verification computes anyway."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ppd.kernels.cpu.bigram import CpuBigramLearner
from vllm_ppd.trees.bigram import OnlineBigram
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk

# Learning takes a few microseconds of every second step, and the table is useful after
# a minute or two of traffic.
_EVERY, _MAX_NODES = 2, 8


class BigramLearner:
    """Ranks of a tensor-parallel group see the same logits and learn the same."""

    def __init__(self, table: OnlineBigram):
        self._kernel = CpuBigramLearner(table)
        self._steps = 0

    def after_walk(
        self, step: TreeStep, walk: TreeWalk, tokens: np.ndarray, logits: torch.Tensor
    ) -> None:
        """Learn from accepted nodes: their token, and the target's distribution there.

        Args:
            step, walk: a verified step.
            tokens: int [sum of num_nodes] token of every node, roots included.
            logits: [sum of num_nodes, V] of every node.
        """
        self._steps += 1
        if self._steps % _EVERY:
            return
        level = np.arange(walk.paths.shape[1])
        request, depth = np.nonzero(level < walk.lengths[:, None])
        nodes = step.first_nodes[request] + walk.paths[request, depth]
        # In turn, if there are more.
        first = self._steps // _EVERY * _MAX_NODES % len(nodes)
        nodes = nodes[first : first + _MAX_NODES]
        self._kernel.run(tokens[nodes], logits[torch.from_numpy(nodes)].float())
