"""Feeds the bigram table with what verification computes anyway."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ppd.kernels.cpu import CpuBigramLearner
from vllm_ppd.trees.bigram_learning import OnlineBigram, learn_bigrams
from vllm_ppd.trees.step import TreeStep
from vllm_ppd.trees.verify import TreeWalk

__all__ = ["TableLearner"]

# Steps between looks, and most nodes looked at: a few microseconds per step, and a
# useful table after a minute or two of traffic.
_EVERY, _MOST_NODES = 2, 8


class TableLearner:
    """Ranks of a tensor-parallel group see the same logits and learn the same."""

    def __init__(self, live: OnlineBigram):
        self._live = live
        self._steps = 0
        self._on_cpu = None
        if live.base.device.type == "cpu":
            self._on_cpu = CpuBigramLearner(live)

    def after_walk(
        self, step: TreeStep, walk: TreeWalk, tokens: np.ndarray, logits: torch.Tensor
    ) -> None:
        """Learn from accepted nodes: what stands there, and what the target says next.

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
        first = self._steps // _EVERY * _MOST_NODES % len(nodes)
        nodes = nodes[first : first + _MOST_NODES]
        if self._on_cpu is not None:
            seen = logits[torch.from_numpy(nodes)].float()
            self._on_cpu.run(tokens[nodes], seen)
            return
        device = self._live.base.device
        index = torch.from_numpy(nodes).to(device, non_blocking=True)
        words = torch.from_numpy(tokens[nodes]).to(device, non_blocking=True)
        learn_bigrams(self._live, words, logits[index].float())
