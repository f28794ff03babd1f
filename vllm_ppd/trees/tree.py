"""Sparse trees of guesses: the shape of one decode step.

One step of one request feeds ``q`` rows to the model, in this order:

    [root] [candidates, parents before children] [prompt rows, node by node]

The root is the last sampled token. A *node* is the root or a candidate; node ``i``
is row ``i``. A node may carry a chain of prompt tokens, each of ``num_ept`` rows,
whose outputs guess the tokens after that node. Every prefix of the rows is itself
a valid smaller tree, because vLLM may cut a request's speculative rows anywhere.

Nothing here knows token ids; see paper section 3 (dynamic sparse tree).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ppd.files import write_json

FORMAT_VERSION = 1
# vLLM's own ceiling for draft tokens of one request in one step, plus the root.
MAX_ROWS = 129


class TreeError(ValueError):
    """A tree, or a file of trees, that cannot be used."""


@dataclass(frozen=True)
class SparseTree:
    """One tree.

    Attributes:
        parents: for candidate ``c`` (node ``c + 1``) the node id of its parent.
        ranks: for each candidate its rank among the guesses for its depth, 0 best.
        prompts: for each node, root first, the number of prompt tokens on it.
        num_ept: rows per prompt token (ensemble prompt tokens, paper section 3.1).

    Raises:
        TreeError: parents not before children, siblings of equal rank, negative
            ranks or counts, lengths that disagree, or more than ``MAX_ROWS`` rows.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    prompts: tuple[int, ...]
    num_ept: int = 1

    def __post_init__(self) -> None:
        for name in ("parents", "ranks", "prompts"):
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))
        count = len(self.parents)
        if len(self.ranks) != count or len(self.prompts) != count + 1:
            raise TreeError(
                f"a tree of {count} candidates needs {count} ranks and {count + 1} "
                f"prompt counts, not {len(self.ranks)} and {len(self.prompts)}"
            )
        for candidate, parent in enumerate(self.parents):
            if not 0 <= parent <= candidate:
                raise TreeError(
                    f"candidate {candidate} (node {candidate + 1}) has parent "
                    f"{parent}; a parent must be an earlier node"
                )
        if len(set(zip(self.parents, self.ranks, strict=True))) != count:
            raise TreeError("two children of one node have the same rank")
        if min(self.ranks, default=0) < 0 or min(self.prompts) < 0:
            raise TreeError("ranks and prompt counts must not be negative")
        if self.num_ept < 1:
            raise TreeError(f"num_ept is {self.num_ept}; it must be at least 1")
        if self.num_rows > MAX_ROWS:
            raise TreeError(
                f"the tree has {self.num_rows} rows; at most {MAX_ROWS} are possible"
            )

    @property
    def num_nodes(self) -> int:
        """Root plus candidates."""
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
        """Depth of the deepest candidate; 0 for a tree without candidates."""
        return max(self.node_depths)

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
            before = row - self.num_ept if index else node
            mask[row] |= mask[before]
        return mask

    def prefix(self, rows: int) -> SparseTree:
        """The tree that the first ``rows`` rows form.

        A prompt token whose ensemble was cut does not count as present.
        """
        if not 1 <= rows <= self.num_rows:
            raise TreeError(f"a prefix of {rows} rows of a tree of {self.num_rows}")
        nodes = min(rows, self.num_nodes)
        prompts = [0] * nodes
        for node, index, ept in self.prompt_rows[: max(0, rows - self.num_nodes)]:
            if ept == self.num_ept - 1:
                prompts[node] = index + 1
        return SparseTree(
            self.parents[: nodes - 1],
            self.ranks[: nodes - 1],
            tuple(prompts),
            self.num_ept,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "parents": list(self.parents),
            "ranks": list(self.ranks),
            "prompts": list(self.prompts),
        }


def chain_tree(length: int, prompts: Sequence[int], num_ept: int = 1) -> SparseTree:
    """A chain of ``length`` best guesses, each the child of the one before.

    prompts: number of prompt tokens on each of the ``length + 1`` nodes.
    """
    return SparseTree(tuple(range(length)), (0,) * length, tuple(prompts), num_ept)


@dataclass(frozen=True)
class TreePolicy:
    """One tree per state.

    The state of a request is the number of prompt tokens on the node where its last
    step ended, that is, to which depth prompt rows guess the next tree. Beyond that
    depth a candidate comes from what is known without them: the bigram table, or
    the continuation of an earlier match of the request's last tokens. The latter is
    the *chain*: the rank-0 child of the root, its rank-0 child, and so on.

    Raises:
        TreeError: more prompt tokens on a node than there are states, or trees of
            different EPT counts.
    """

    trees: tuple[SparseTree, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "trees", tuple(self.trees))
        if len(self.trees) < 2:
            raise TreeError("a policy needs a tree for state 0 and for state 1")
        for state, tree in enumerate(self.trees):
            if max(tree.prompts) > self.num_prompt_tokens:
                raise TreeError(
                    f"the tree of state {state} puts {max(tree.prompts)} prompt "
                    f"tokens on a node; {self.num_prompt_tokens} are trained"
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

    @property
    def max_rank(self) -> int:
        """Largest rank any tree uses; -1 if no tree has candidates."""
        return max(max(tree.ranks, default=-1) for tree in self.trees)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "ppd_tree_policy",
            "format_version": FORMAT_VERSION,
            "num_ept": self.num_ept,
            "trees": [tree.to_dict() for tree in self.trees],
        }

    def require_prompted(self) -> None:
        """Raise TreeError if a tree reaches deeper than prompt rows guess."""
        for state, tree in enumerate(self.trees):
            if tree.depth > state:
                raise TreeError(
                    f"the tree of state {state} is {tree.depth} deep, but only "
                    f"{state} prompt rows are there to fill it; calibrate the prompt "
                    "tokens with a bigram table, or use a shallower tree"
                )

    @classmethod
    def from_dict(cls, data: Any) -> TreePolicy:
        """Read what :meth:`to_dict` wrote; unknown and missing keys are errors."""
        _require_keys(data, {"format", "format_version", "num_ept", "trees"}, "policy")
        if data["format"] != "ppd_tree_policy":
            raise TreeError(f"format is {data['format']!r}, expected 'ppd_tree_policy'")
        if data["format_version"] != FORMAT_VERSION:
            raise TreeError(
                f"format_version {data['format_version']!r} is not supported; this "
                f"version of vllm-ppd reads {FORMAT_VERSION}"
            )
        if not isinstance(data["trees"], list):
            raise TreeError("'trees' must be a list of trees, one per state")
        trees = []
        for state, tree in enumerate(data["trees"]):
            _require_keys(tree, {"parents", "ranks", "prompts"}, f"tree {state}")
            trees.append(SparseTree(**tree, num_ept=data["num_ept"]))
        return cls(tuple(trees))

    def save(self, path: Path | str) -> None:
        """Write the policy as JSON (to a temporary name, then renamed)."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> TreePolicy:
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            raise TreeError(f"cannot read the tree policy {path}: {error}") from error
        except json.JSONDecodeError as error:
            raise TreeError(f"{path} is not JSON: {error}") from error
        except (TreeError, TypeError, ValueError) as error:
            raise TreeError(f"{path} is not a usable tree policy: {error}") from error


def _require_keys(data: Any, keys: set[str], what: str) -> None:
    if not isinstance(data, dict):
        raise TreeError(f"{what} must be a JSON object, not {type(data).__name__}")
    if unknown := sorted(set(data) - keys):
        raise TreeError(f"unknown key {unknown[0]!r} in the {what}")
    if missing := sorted(keys - set(data)):
        raise TreeError(f"key {missing[0]!r} is missing in the {what}")
