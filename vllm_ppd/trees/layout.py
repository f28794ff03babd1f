"""Trees as padded arrays, and one step of a batch: which row is which tree's node.

Axis S is the tree id (of a policy alone: num_prompted), Q the row inside a tree, N the
node.

Every request of a batch takes part in a step. One without draft rows (a prefill chunk,
a plain decode) is a tree cut down to its root, which is the last row scheduled for it,
so nothing below needs a special case for it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from vllm_ppd.trees.menu import TreeMenu
from vllm_ppd.trees.tree import TreePolicy

WORD_BITS = 64


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """Pack boolean rows into little-endian 64-bit words.

    Args:
        mask: [..., q] bool.

    Returns:
        [..., ceil(q / 64)] int64; bit ``j % 64`` of word ``j // 64`` is ``mask[j]``.
    """
    q = mask.shape[-1]
    words = -(-q // WORD_BITS)
    padded = np.zeros((*mask.shape[:-1], words * WORD_BITS), dtype=bool)
    padded[..., :q] = mask
    return np.packbits(padded, axis=-1, bitorder="little").view("<i8")


class TreeTables:
    """The trees of a menu, or of one policy, as arrays to look up by tree id.

    Rows past a tree's end are *fillers*: they attend to the root and to themselves, and
    no output of theirs is read. vLLM may schedule more rows than a tree has.

    Attributes:
        depths: [S, Q] row position minus root position.
        ancestors: [S, Q, W] int64 bit masks of visible in-step rows.
        num_nodes, num_rows: [S].
        max_depth: of the deepest draft token.
        max_children: draft tokens needed per parent, the largest rank in use plus one.
        parents: [S, N] parent node, -1 for the root and for padding.
        node_depths, node_ranks: [S, N] of each draft token, 0 padded.
        on_ngram: [S, N] whether a node's path follows the n-gram draft, root included.
        prompts: [S, N] prompt tokens per node.
        first_prompt_rows: [S, N] first prompt row of each node.
        soft_ids: [S, Q] id of a prompt row's embedding, 0 for other rows. Ids start
            at ``first_soft_id``, prompt token major and EPT minor.
    """

    def __init__(
        self,
        policy: TreePolicy | TreeMenu,
        first_soft_id: int,
        num_rows: int | None = None,
    ):
        """
        Args:
            policy: the trees.
            first_soft_id: id of the first prompt row's embedding.
            num_rows: least Q, for engines that pad trees.
        """
        self.num_ept = policy.num_ept
        trees = policy.trees
        count = len(trees)
        q = max(policy.max_rows, num_rows or 0)
        n = max(tree.num_nodes for tree in trees)
        self.max_depth = max(tree.depth for tree in trees)
        self.max_children = 1 + max(max(tree.ranks, default=0) for tree in trees)
        self.num_nodes = np.array([tree.num_nodes for tree in trees])
        self.num_rows = np.array([tree.num_rows for tree in trees])
        self.depths = np.ones((count, q), dtype=np.int64)
        self.soft_ids = np.zeros((count, q), dtype=np.int64)
        self.parents = np.full((count, n), -1)
        self.node_depths = np.zeros((count, n), dtype=np.int64)
        self.node_ranks = np.zeros((count, n), dtype=np.int64)
        self.prompts = np.zeros((count, n), dtype=np.int64)
        self.first_prompt_rows = np.zeros((count, n), dtype=np.int64)
        self.on_ngram = np.zeros((count, n), dtype=bool)
        chained = policy.chained if isinstance(policy, TreeMenu) else (False,) * count
        mask = np.zeros((count, q, q), dtype=bool)
        mask[:, :, 0] = True
        mask[:, np.arange(q), np.arange(q)] = True
        for index, tree in enumerate(trees):
            nodes, rows = tree.num_nodes, tree.num_rows
            self.depths[index, :rows] = tree.row_depths
            mask[index, :rows, :rows] = tree.mask
            self.parents[index, 1:nodes] = tree.parents
            self.node_depths[index, :nodes] = tree.node_depths
            self.node_ranks[index, 1:nodes] = tree.ranks
            self.prompts[index, :nodes] = tree.prompts
            if chained[index]:
                self.on_ngram[index, :nodes] = tree.ngram_path
            sizes = np.array(tree.prompts) * tree.num_ept
            self.first_prompt_rows[index, :nodes] = nodes + np.cumsum(sizes) - sizes
            for row, (_, prompt, ept) in enumerate(tree.prompt_rows, nodes):
                self.soft_ids[index, row] = first_soft_id + prompt * tree.num_ept + ept
        self.ancestors = pack_mask(mask)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenated ``arange(start, start + count)`` for each pair.

    >>> ranges(np.array([5, 20]), np.array([2, 3])).tolist()
    [5, 6, 20, 21, 22]
    """
    if len(counts) == 1:
        # Host time shows most where one request decodes alone.
        start = int(starts[0])
        return np.arange(start, start + int(counts[0]))
    total = int(counts.sum())
    firsts = np.cumsum(counts) - counts
    return np.arange(total) + np.repeat(starts - firsts, counts)


def spread(values: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """[total, ...] zeros with `values` at `rows`.

    >>> spread(np.array([7, 8]), np.array([0, 2]), 4).tolist()
    [7, 0, 8, 0]
    """
    wide = np.zeros((total, *values.shape[1:]), dtype=values.dtype)
    wide[rows] = values
    return wide


class TreeStep:
    """Where the trees of a batch lie among the step's rows.

    Args:
        tables: the trees.
        tree_ids: [B] id of the tree that each request runs.
        starts: [B] index of each request's root among all rows of the step.
        num_rows: [B] rows of the tree that were scheduled, root included.
    """

    def __init__(
        self,
        tables: TreeTables,
        tree_ids: np.ndarray,
        starts: np.ndarray,
        num_rows: np.ndarray,
    ):
        self.tables = tables
        self.tree_ids = tree_ids
        self.starts = starts
        self.num_rows = num_rows
        # vLLM may have cut the rows anywhere; nodes come first.
        self.num_nodes = np.minimum(num_rows, tables.num_nodes[tree_ids])
        self.first_nodes = np.cumsum(self.num_nodes) - self.num_nodes
        # Requests whose rows need tree masks; the caller may add plain decodes.
        self.tree_requests = np.flatnonzero(num_rows > 1)

    @cached_property
    def node_rows(self) -> np.ndarray:
        """[sum of num_nodes] the step's rows that are nodes, request by request."""
        return ranges(self.starts, self.num_nodes)

    def tree_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of requests that have draft rows.

        Returns:
            (rows, tree ids, in-tree rows), each [total], to index the tables with.
        """
        counts = self.num_rows[self.tree_requests]
        rows = ranges(self.starts[self.tree_requests], counts)
        return (
            rows,
            np.repeat(self.tree_ids[self.tree_requests], counts),
            ranges(np.zeros_like(counts), counts),
        )

    def prompt_rows(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prompt rows attached to one node of each request.

        A prompt token whose ensemble was cut off does not count.

        Args:
            nodes: [B] a node of each request.

        Returns:
            rows [sum of counts * num_ept] of the step, request by request and
            prompt token major, and counts [B] of complete prompt tokens, which is
            the request's next num_prompted.
        """
        tables, tree_ids, ept = self.tables, self.tree_ids, self.tables.num_ept
        firsts = tables.first_prompt_rows[tree_ids, nodes]
        counts = np.clip(
            (self.num_rows - firsts) // ept, 0, tables.prompts[tree_ids, nodes]
        )
        return ranges(self.starts + firsts, counts * ept), counts
