"""Verification: each request's tree is walked along the tokens that the target samples.

At every visited node the target's own sampler picks the next token. If a child carries
it, the walk continues there; otherwise it ends, and the token is the step's last one.
Draft tokens are fixed before the target's noise is drawn, so the output has exactly the
distribution of plain decoding, whatever the draft tokens are.
"""

from __future__ import annotations

import numpy as np

from vllm_ppd.trees.layout import TreeStep


class TreeWalk:
    """The walk of a whole batch, one level at a time.

    Args:
        step: the layout of the batch's trees.
        tokens: [sum of num_nodes] token of each node, in the order of
            ``step.node_rows`` (those of roots are ignored).

    Attributes:
        nodes: [B] the node each request has reached.
        active: [B] bool, requests whose walk continues.
        tokens_out: [B, max_depth + 1] emitted tokens, -1 padded.
        paths: [B, max_depth + 1] visited nodes (column 0 the root), 0 padded.
        lengths: [B] tokens emitted so far.
        tokens, parents: [B, N] token and parent of each node; -1 for the root's and
            for nodes that were not scheduled.
    """

    def __init__(self, step: TreeStep, tokens: np.ndarray):
        tables = step.tables
        width = tables.parents.shape[1]
        node = np.arange(width)
        present = node < step.num_nodes[:, None]
        index = np.where(present, step.first_nodes[:, None] + node, 0)
        self.tokens = np.where(present & (node > 0), tokens[index], -1)
        self.parents = tables.parents[step.tree_ids]
        self._start(step)

    @classmethod
    def empty(cls, step: TreeStep) -> TreeWalk:
        """A walk to be filled in by a kernel; it cannot `descend`."""
        walk = cls.__new__(cls)
        walk._start(step)
        return walk

    def _start(self, step: TreeStep) -> None:
        batch, tables = len(step.tree_ids), step.tables
        self._first_nodes = step.first_nodes
        self._level = 0
        self.nodes = np.zeros(batch, dtype=np.int64)
        self.active = np.ones(batch, dtype=bool)
        self.tokens_out = np.full((batch, tables.max_depth + 1), -1)
        self.paths = np.zeros((batch, tables.max_depth + 1), dtype=np.int64)
        self.lengths = np.zeros(batch, dtype=np.int64)

    @property
    def logit_rows(self) -> np.ndarray:
        """[B] each request's current node among all nodes of the step."""
        return self._first_nodes + self.nodes

    def descend(self, picked: np.ndarray) -> bool:
        """Take the target's token at every request's current node.

        Args:
            picked: [B] token ids; entries of requests that are done are ignored.

        Returns:
            whether any request continues.
        """
        active, level = self.active, self._level
        self.tokens_out[active, level] = picked[active]
        self.lengths += active
        children = (self.parents == self.nodes[:, None]) & (
            self.tokens == picked[:, None]
        )
        child = children.argmax(axis=1)
        # Node 0 is never a child, so 0 means that none carries the token.
        self.active = active & (child > 0)
        self.nodes = np.where(self.active, child, self.nodes)
        self._level = level + 1
        continues = bool(self.active.any())
        if continues:
            self.paths[:, level + 1] = np.where(self.active, child, 0)
        return continues

    def run_greedy(self, picked: np.ndarray) -> None:
        """The whole walk when the target's token at every node is already known.

        Args:
            picked: [sum of num_nodes] the target's token after each node.
        """
        while self.descend(picked[self.logit_rows]):
            pass


def kv_moves(step: TreeStep, walk: TreeWalk) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose KV must move so that the accepted path follows the context.

    A tree's rows were written to consecutive slots. The accepted node of depth ``d``
    belongs in the slot of row ``d``; the walk visits parents first, so row numbers
    rise along a path, sources are never before targets, and copying in order is safe.

    Returns:
        (sources, targets): rows of the step, in the order to copy in.
    """
    depth = np.arange(walk.paths.shape[1])
    moved = (depth < walk.lengths[:, None]) & (walk.paths != depth)
    request, level = np.nonzero(moved)
    starts = step.starts[request]
    return starts + walk.paths[request, level], starts + level
