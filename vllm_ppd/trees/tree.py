"""Sparse trees: which draft rows a request has in one decode step.

One step of one request feeds ``q`` rows to the model, in this order:

    [root] [draft tokens, parents before children] [prompt rows, node by node]

The root is the last sampled token. A *node* is the root or a draft token; node ``i``
is row ``i``. A node may carry a chain of prompt tokens, each of ``num_ept`` rows,
whose outputs predict the tokens after that node. Every prefix of the rows is itself
a valid smaller tree, because vLLM may cut a request's draft rows anywhere.

Trees do not contain token ids; see paper section 3 (dynamic sparse tree).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vllm_ppd.files import check_content, check_keys

FORMAT = "ppd_tree_policy"
FORMAT_VERSION = 1
# vLLM's own limit for draft tokens of one request in one step, plus the root.
MAX_ROWS = 129
_TREE_KEYS = ("parents", "ranks", "prompts")


class TreeError(ValueError):
    """A tree, a policy or a tree menu that cannot be used."""


@dataclass(frozen=True)
class SparseTree:
    """The shape of one step's rows.

    Attributes:
        parents: for draft token ``c`` (node ``c + 1``) the node id of its parent.
        ranks: for each draft token its rank among the draft tokens with the same
            parent, 0 best.
        prompts: for each node, root first, the number of prompt tokens on it.
        num_ept: rows per prompt token (ensemble prompt tokens, paper section 3.1).

    Raises:
        TreeError: parents not before children, siblings of equal rank, negative
            ranks or counts, lengths that disagree.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    prompts: tuple[int, ...]
    num_ept: int = 1

    def __post_init__(self) -> None:
        for name in _TREE_KEYS:
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))
        count = len(self.parents)
        if len(self.ranks) != count or len(self.prompts) != count + 1:
            raise TreeError(
                f"a tree of {count} draft tokens needs {count} ranks and {count + 1} "
                f"prompt counts, not {len(self.ranks)} and {len(self.prompts)}"
            )
        for index, parent in enumerate(self.parents):
            if not 0 <= parent <= index:
                raise TreeError(
                    f"draft token {index} (node {index + 1}) has parent {parent}; a "
                    "parent must be an earlier node"
                )
        if len(set(zip(self.parents, self.ranks, strict=True))) != count:
            raise TreeError("two children of one node have the same rank")
        if min(self.ranks, default=0) < 0 or min(self.prompts) < 0:
            raise TreeError("ranks and prompt counts must not be negative")
        if self.num_ept < 1:
            raise TreeError(f"num_ept is {self.num_ept}; it must be at least 1")

    @property
    def num_nodes(self) -> int:
        """Root plus draft tokens."""
        return len(self.parents) + 1

    @property
    def num_rows(self) -> int:
        """All rows of the step: nodes and prompt rows."""
        return self.num_nodes + self.num_ept * sum(self.prompts)

    @cached_property
    def node_depths(self) -> tuple[int, ...]:
        """Distance of each node from the root, root (0) first."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Depth of the deepest draft token; 0 for the root-only tree."""
        return max(self.node_depths)

    @cached_property
    def ngram_path(self) -> tuple[bool, ...]:
        """For each node whether its path from the root has rank 0 all along.

        Where the last tokens have an n-gram match, the n-gram draft stands there.
        """
        path = [True]
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            path.append(path[parent] and rank == 0)
        return tuple(path)

    @cached_property
    def prompt_rows(self) -> tuple[tuple[int, int, int], ...]:
        """(node, prompt token, EPT) of each prompt row, in row order."""
        return tuple(
            (node, index, ept)
            for node, count in enumerate(self.prompts)
            for index in range(count)
            for ept in range(self.num_ept)
        )

    @cached_property
    def row_depths(self) -> np.ndarray:
        """[q] position of each row minus the root's position."""
        return np.array(
            [*self.node_depths]
            + [
                self.node_depths[node] + 1 + index
                for node, index, _ in self.prompt_rows
            ]
        )

    @cached_property
    def mask(self) -> np.ndarray:
        """[q, q] bool: ``mask[i, j]`` means row ``i`` attends to row ``j``.

        A node sees its ancestors and itself. EPT ``j`` of a prompt token sees its
        node, that node's ancestors, EPT ``j`` of the earlier prompt tokens of the
        same chain, and itself (the paper's ensemble attention).
        """
        mask = np.eye(self.num_rows, dtype=bool)
        for node, parent in enumerate(self.parents, start=1):
            mask[node] |= mask[parent]
        for row, (node, index, _ept) in enumerate(self.prompt_rows, self.num_nodes):
            mask[row] |= mask[row - self.num_ept if index else node]
        return mask

    def in_serving_order(self, reached: np.ndarray) -> SparseTree:
        """The same tree with its draft tokens in the order in which they are served.

        First the principal chain (the likeliest child of the root, its likeliest
        child, ...): if that is accepted, its KV already lies in its final slots. Then
        by falling path probability, so that a cut loses the least likely ones.

        Args:
            reached: [num_nodes] probability that verification reaches each node.
        """
        parents = (-1, *self.parents)
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(self.parents, start=1):
            children[parent].append(node)
        order = [0]
        while children[order[-1]]:
            order.append(max(children[order[-1]], key=lambda node: reached[node]))
        chain = set(order)
        rest = (node for node in range(len(parents)) if node not in chain)
        # A certain child is as likely as its parent; depth keeps the parent first.
        depths = self.node_depths
        order += sorted(rest, key=lambda node: (-reached[node], depths[node]))
        place = {node: index for index, node in enumerate(order)}
        return SparseTree(
            tuple(place[parents[node]] for node in order[1:]),
            tuple(self.ranks[node - 1] for node in order[1:]),
            tuple(self.prompts[node] for node in order),
            self.num_ept,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without `num_ept`."""
        return {name: list(getattr(self, name)) for name in _TREE_KEYS}


def chain_tree(length: int, prompts: Sequence[int], num_ept: int = 1) -> SparseTree:
    """A chain of ``length`` rank-0 draft tokens, each the child of the one before.

    prompts: number of prompt tokens on each of the ``length + 1`` nodes.
    """
    return SparseTree(tuple(range(length)), (0,) * length, tuple(prompts), num_ept)


@dataclass(frozen=True)
class TreePolicy:
    """One tree for each ``num_prompted``, from 0 to the number of prompt tokens.

    ``num_prompted`` of a request is the number of prompt tokens on the node where its
    last step ended, that is, how deep their rows reach in the next tree. Deeper draft
    tokens come from the bigram table or from an n-gram match.

    Raises:
        TreeError: more prompt tokens on a node than there are, more than ``MAX_ROWS``
            rows, or trees of different EPT counts.
    """

    trees: tuple[SparseTree, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "trees", tuple(self.trees))
        if not self.trees:
            raise TreeError("a policy needs a tree for num_prompted 0")
        for num_prompted, tree in enumerate(self.trees):
            if max(tree.prompts) > self.num_prompt_tokens:
                raise TreeError(
                    f"the tree of num_prompted {num_prompted} puts {max(tree.prompts)} "
                    f"prompt tokens on a node; {self.num_prompt_tokens} are trained"
                )
            if tree.num_rows > MAX_ROWS:
                raise TreeError(
                    f"the tree of num_prompted {num_prompted} has {tree.num_rows} "
                    f"rows; at most {MAX_ROWS} are possible"
                )
        if len({tree.num_ept for tree in self.trees}) != 1:
            raise TreeError("all trees of a policy must have the same num_ept")

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.trees) - 1

    @property
    def num_ept(self) -> int:
        return self.trees[0].num_ept

    @property
    def max_rows(self) -> int:
        return max(tree.num_rows for tree in self.trees)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_ept": self.num_ept,
            "trees": [tree.to_dict() for tree in self.trees],
        }

    @classmethod
    def from_dict(cls, data: Any) -> TreePolicy:
        """Read what :meth:`to_dict` wrote; raises FormatError or TreeError."""
        content = check_content(
            data,
            kind="a tree policy",
            format=FORMAT,
            version=FORMAT_VERSION,
            keys=("num_ept", "trees"),
        )
        if not isinstance(content["trees"], list):
            raise TreeError("'trees' must be a list of trees, one per num_prompted")
        trees = []
        for num_prompted, tree in enumerate(content["trees"]):
            try:
                check_keys(tree, _TREE_KEYS)
                trees.append(SparseTree(**tree, num_ept=content["num_ept"]))
            except (TypeError, ValueError, OverflowError) as error:
                raise TreeError(f"tree {num_prompted}: {error}") from error
        return cls(tuple(trees))
