"""A tree as lines of text: one node per line, or one run of like leaves.

Colours, bars and frames are the terminal's business (`cli/tree_view.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ppd.trees.plain_tree import TreeLike

__all__ = ["ASCII", "LINES", "Guides", "TreeLine", "chain_nodes", "tree_lines"]

# Sibling leaves from which on they share a line.
_RUN = 3


@dataclass(frozen=True)
class Guides:
    """What joins a node to its parent, two columns wide each."""

    child: str
    last: str
    beside: str
    blank: str = "  "


LINES = Guides("├ ", "└ ", "│ ")
ASCII = Guides("|-", "`-", "| ")


@dataclass(frozen=True)
class TreeLine:
    """One line of a drawing.

    Attributes:
        depth: tokens after the root.
        guide: the branches to the left of it.
        nodes: node ids, more than one for a run of leaves.
        ranks: rank of each among the guesses, 0 best; empty for the root. On the
            chain and beside it, rank 0 is the chain's token.
        reached: chance that verification reaches each.
        prompts: prompt tokens on each.
        on_chain: it continues an earlier match.
        beside_chain: its parent is on the chain and it is not.
    """

    depth: int
    guide: str
    nodes: tuple[int, ...]
    ranks: tuple[int, ...]
    reached: tuple[float, ...]
    prompts: int
    on_chain: bool = False
    beside_chain: bool = False

    @property
    def label(self) -> str:
        """The guess by its place, 1 for the best; "copy" on the chain.

        "2-5" are the second to the fifth, "4 of 2-9" are four of the second to ninth.
        """
        if not self.ranks:
            return "root"
        if self.on_chain:
            return "copy"
        places = [rank + (not self.beside_chain) for rank in self.ranks]
        if len(places) == 1:
            return str(places[0])
        low, high = min(places), max(places)
        several = f"{len(places)} of " if high - low >= len(places) else ""
        return f"{several}{low}-{high}"


def chain_nodes(tree: TreeLike, chained: bool) -> list[bool]:
    """[nodes] whether each continues an earlier match; the root counts as such."""
    on = [chained]
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        on.append(on[parent] and rank == 0)
    return on


def tree_lines(
    tree: TreeLike,
    reached: Sequence[float] | np.ndarray,
    chained: bool = False,
    limit: int | None = None,
    guides: Guides = LINES,
) -> tuple[list[TreeLine], int]:
    """The lines of a tree, and how many nodes are left out.

    Args:
        tree: parents before children.
        reached: [nodes] chance of each node, root first.
        chained: its chain continues an earlier match.
        limit: most lines; the likeliest nodes are kept.
        guides: characters to draw with.
    """
    on = chain_nodes(tree, chained)
    children: list[list[int]] = [[] for _ in on]
    for node, parent in enumerate(tree.parents, start=1):
        children[parent].append(node)
    groups = _groups(tree, children, on)
    kept = _likeliest(tree, groups, reached, limit)
    lines: list[TreeLine] = []

    def draw(group: tuple[int, ...], depth: int, guide: str, below: str) -> None:
        node = group[0]
        parent = tree.parents[node - 1] if node else 0
        ranks = tuple(tree.ranks[each - 1] for each in group) if node else ()
        lines.append(
            TreeLine(
                depth,
                guide,
                group,
                ranks,
                tuple(float(reached[each]) for each in group),
                tree.prompts[node],
                bool(node) and on[node],
                bool(node) and on[parent] and not on[node],
            )
        )
        shown = [each for each in groups[node] if each[0] in kept]
        for place, each in enumerate(shown):
            last = place == len(shown) - 1
            draw(
                each,
                depth + 1,
                below + (guides.last if last else guides.child),
                below + (guides.blank if last else guides.beside),
            )

    draw((0,), 0, "", "")
    return lines, len(on) - sum(len(line.nodes) for line in lines)


def _groups(
    tree: TreeLike, children: list[list[int]], on: list[bool]
) -> list[list[tuple[int, ...]]]:
    """For each node its children, leaves that look alike taken together."""
    groups: list[list[tuple[int, ...]]] = []
    for under in children:
        found: list[tuple[int, ...]] = []
        for node in under:
            like = found and _alike(found[-1][0], node, tree, children, on)
            if like:
                found[-1] = (*found[-1], node)
            else:
                found.append((node,))
        groups.append([])
        for group in found:
            short = len(group) < _RUN
            groups[-1] += [(node,) for node in group] if short else [group]
    return groups


def _alike(
    a: int, b: int, tree: TreeLike, children: list[list[int]], on: list[bool]
) -> bool:
    leaves = not children[a] and not children[b]
    return leaves and on[a] == on[b] and tree.prompts[a] == tree.prompts[b]


def _likeliest(
    tree: TreeLike,
    groups: list[list[tuple[int, ...]]],
    reached: Sequence[float] | np.ndarray,
    limit: int | None,
) -> set[int]:
    """First nodes of the `limit` likeliest groups; parents before their children."""
    firsts = [group[0] for each in groups for group in each]
    if limit is None or len(firsts) + 1 <= limit:
        return {0, *firsts}
    depths = [0]
    for parent in tree.parents:
        depths.append(depths[parent] + 1)
    firsts.sort(key=lambda node: (-reached[node], depths[node]))
    return {0, *firsts[: max(1, limit) - 1]}
