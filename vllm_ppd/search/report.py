"""What a menu entry is expected to do: its trees, and how far walks get in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import policy_value, reach_probabilities
from vllm_ppd.trees.menu import MenuEntry
from vllm_ppd.trees.tree import SparseTree

__all__ = ["TreeFigures", "entry_figures"]


@dataclass(frozen=True)
class TreeFigures:
    """One tree of an entry, and what is expected of it.

    Attributes:
        match_class: 0 without an n-gram match.
        num_prompted: how deep the prompt rows of the last step reach.
        tree: the tree.
        share: part of the steps that are made with it.
        reached: [nodes] probability that verification reaches each, root (1) first.
    """

    match_class: int
    num_prompted: int
    tree: SparseTree
    share: float
    reached: np.ndarray

    @property
    def acceptance_length(self) -> float:
        """Mean tokens of a step with this tree."""
        return float(self.reached.sum())


def entry_figures(entry: MenuEntry, model: AcceptanceModel) -> list[TreeFigures]:
    """The trees of an entry by falling share of the steps.

    model: with as many match classes as the entry has.
    """
    trees = [policy.trees for policy in entry.policies]
    shares = policy_value(trees, model, LatencyCurve.constant())[2]
    figures = [
        TreeFigures(
            match_class,
            num_prompted,
            tree,
            # Least squares may leave a hair below zero.
            max(0.0, float(shares[match_class, num_prompted])),
            reach_probabilities(tree, model, num_prompted, match_class),
        )
        for match_class, policy in enumerate(entry.policies)
        for num_prompted, tree in enumerate(policy.trees)
    ]
    return sorted(figures, key=lambda figure: -figure.share)
