"""One step of a batch: which rows belong to which node of which request's tree.

Every request of the batch takes part. One without guesses (a prefill chunk, a plain
decode) is a tree cut down to its root, which is the last row scheduled for it, so
nothing below needs a special case for it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from vllm_ppd.trees.layout import TreeTables


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenated ``arange(start, start + count)`` for each pair.

    >>> ranges(np.array([5, 20]), np.array([2, 3])).tolist()
    [5, 6, 20, 21, 22]
    """
    if len(counts) == 1:
        # One request decoding alone is where every microsecond shows.
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
        tables: the policy's arrays.
        states: [B] the state whose tree each request runs.
        starts: [B] index of each request's root among all rows of the step.
        num_rows: [B] rows of the tree that were scheduled, root included.
    """

    def __init__(
        self,
        tables: TreeTables,
        states: np.ndarray,
        starts: np.ndarray,
        num_rows: np.ndarray,
    ):
        self.tables = tables
        self.states = states
        self.starts = starts
        self.num_rows = num_rows
        # vLLM may have cut the rows anywhere; nodes come first.
        self.num_nodes = np.minimum(num_rows, tables.num_nodes[states])
        self.first_nodes = np.cumsum(self.num_nodes) - self.num_nodes
        # Requests whose rows need tree masks; the caller may add plain decodes.
        self.trees = np.flatnonzero(num_rows > 1)

    @cached_property
    def node_rows(self) -> np.ndarray:
        """[sum of num_nodes] the step's rows that are nodes, request by request."""
        return ranges(self.starts, self.num_nodes)

    def tree_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of requests that have guesses.

        Returns:
            (rows, states, in-tree rows), each [total], to index the tables with.
        """
        counts = self.num_rows[self.trees]
        rows = ranges(self.starts[self.trees], counts)
        return (
            rows,
            np.repeat(self.states[self.trees], counts),
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
            the request's next state.
        """
        tables, states, ept = self.tables, self.states, self.tables.num_ept
        firsts = tables.first_prompt_rows[states, nodes]
        counts = np.clip(
            (self.num_rows - firsts) // ept, 0, tables.prompts[states, nodes]
        )
        return ranges(self.starts + firsts, counts * ept), counts
