"""Trees as plain tuples: what the search builds before a tree may be served.

A :class:`~vllm_ppd.trees.tree.SparseTree` holds at most as many rows as vLLM runs. The
published figures go beyond that, so searching and evaluating need a tree without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from vllm_ppd.trees.tree import SparseTree, TreePolicy

__all__ = ["PlainTree", "TreeLike", "arrange", "as_policy", "path_probabilities"]


class TreeLike(Protocol):
    """What evaluation reads of a tree; see SparseTree for the meaning."""

    @property
    def parents(self) -> tuple[int, ...]: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def prompts(self) -> tuple[int, ...]: ...
    @property
    def num_rows(self) -> int: ...


class PlainTree(NamedTuple):
    """The fields of a SparseTree, of any size and unchecked."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    prompts: tuple[int, ...]
    num_ept: int = 1

    @property
    def num_rows(self) -> int:
        """All rows of the step: root, candidates and prompt rows."""
        return 1 + len(self.parents) + self.num_ept * sum(self.prompts)


def as_policy(trees: Iterable[PlainTree]) -> TreePolicy:
    """The trees of states 0..m as a policy that can be served.

    Raises TreeError when a tree has more rows than vLLM runs.
    """
    return TreePolicy(tuple(SparseTree(*tree) for tree in trees))


def path_probabilities(
    parents: Sequence[int], ranks: Sequence[int], acceptance: np.ndarray
) -> np.ndarray:
    """[1 + candidates] chance that verification reaches each node, root (1) first.

    The product of `acceptance` [m, K] along the path: the paper takes depths to be
    independent.
    """
    depths = [0]
    reached = [1.0]
    for parent, rank in zip(parents, ranks, strict=True):
        reached.append(reached[parent] * float(acceptance[depths[parent], rank]))
        depths.append(depths[parent] + 1)
    return np.array(reached)


def arrange(tree: PlainTree, reached: np.ndarray) -> PlainTree:
    """The same tree with its candidates in serving order.

    `reached` is [1 + candidates], the chance that verification reaches each node.
    First the principal chain (the best child of the root, its best child, ...): when
    that is what gets accepted, its KV already lies where it belongs. Then by falling
    path probability, so that a cut at the end loses the least likely candidates.
    """
    parents = (-1, *tree.parents)
    depths = [0] * len(parents)
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(tree.parents, start=1):
        children[parent].append(node)
        depths[node] = depths[parent] + 1
    order = [0]
    while children[order[-1]]:
        order.append(max(children[order[-1]], key=lambda node: reached[node]))
    chain = set(order)
    rest = (node for node in range(len(parents)) if node not in chain)
    # A sure child is as likely as its parent; depth keeps the parent first.
    order += sorted(rest, key=lambda node: (-reached[node], depths[node]))
    place = {node: index for index, node in enumerate(order)}
    return PlainTree(
        tuple(place[parents[node]] for node in order[1:]),
        tuple(tree.ranks[node - 1] for node in order[1:]),
        tuple(tree.prompts[node] for node in order),
        tree.num_ept,
    )
