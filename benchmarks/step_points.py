"""Places in held-out text at which steps begin, and what nodes' children are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from vllm_ppd.train.continuation import Continuation
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.drafting import POOL, BigramTensors

RANKS = 32


@dataclass
class Children:
    """The best children of one node, best first."""

    ids: np.ndarray
    shares: np.ndarray


@dataclass
class Point:
    """One place where a step may begin, with all prompt rows at hand."""

    logits: np.ndarray
    """[m, V] less their logarithm of the sum, so that shares are their exponentials."""
    best: np.ndarray
    """[m, POOL] likeliest tokens of each."""
    parents: np.ndarray
    """[m] the true token before each depth's candidates, the root first."""
    truth: np.ndarray
    """[m]"""
    known: dict[tuple[int, int], Children] = field(default_factory=dict)


class Ranker:
    """Ranks children as serving does, and keeps their shares of the scores.

    Args:
        table: the bigram table.
    """

    def __init__(self, table: BigramTable):
        bigram = BigramTensors.of(table)
        self._ids = bigram.ids.numpy()
        self._gains = bigram.gains.double().numpy()
        self._floor = bigram.floor.double().numpy()
        self._weights = table.weights

    def children(self, point: Point, depth: int, parent: int) -> Children:
        """Of a node with the token `parent`, `depth` below the root (from 0)."""
        if (depth, parent) not in point.known:
            point.known[depth, parent] = self._rank(point, depth, parent)
        return point.known[depth, parent]

    def _rank(self, point: Point, depth: int, parent: int) -> Children:
        logits, weight = point.logits[depth], self._weights[depth]
        own, floor = self._ids[parent], weight * self._floor[parent]
        gains = weight * self._gains[parent]
        others = point.best[depth][~np.isin(point.best[depth], own)]
        ids = np.concatenate([own, others])
        scores = np.concatenate([logits[own] + gains, logits[others] + floor])
        # All that is not listed has the floor's gain; the listed ones their own.
        listed = np.exp(logits[own])
        total = math.exp(floor) * (1 - listed.sum()) + (listed * np.exp(gains)).sum()
        order = np.argsort(-scores, kind="stable")[:RANKS]
        return Children(ids[order], np.exp(scores[order]) / max(total, 1e-30))


class Points:
    """What `measure` reports of its points; calls `take` with each run of neighbours.

    It has the methods of `AcceptanceCounts` that `measure` calls.
    """

    def __init__(self, m: int, take: Callable[[list[Point]], None]):
        self._m, self._take = m, take

    def add_texts(self, continuation: Continuation) -> None:
        self._tokens = continuation.tokens.numpy()

    def add_points(self, sequence: torch.Tensor, target: torch.Tensor) -> None:
        self._rows, targets = sequence[:, 0].numpy(), target.numpy()
        self._roots = targets[:, 0]
        self._parents = self._tokens[self._rows[:, None], targets]
        self._truth = self._tokens[self._rows[:, None], targets + 1]
        self._logits: list[np.ndarray] = []
        self._best: list[np.ndarray] = []

    def add_logits(self, first: int, logits: torch.Tensor) -> None:
        del first  # They come in order.
        self._logits.append(logits.double().log_softmax(1).numpy())
        self._best.append(logits.topk(POOL).indices.numpy())

    def end_points(self) -> None:
        shape = len(self._rows), self._m, -1
        logits = np.concatenate(self._logits).reshape(shape)
        best = np.concatenate(self._best).reshape(shape)
        points = [
            Point(*each)
            for each in zip(logits, best, self._parents, self._truth, strict=True)
        ]
        apart = (np.diff(self._rows) != 0) | (np.diff(self._roots) != 1)
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(points)]
        for begin, end in pairwise(bounds):
            self._take(points[begin:end])
