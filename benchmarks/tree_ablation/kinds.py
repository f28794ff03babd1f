"""Trees of each kind at a number of rows, from the same acceptance.

What is held fixed is the most rows of a tree, root and prompt rows counted; each kind
then takes the trees that it can for the most tokens per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.baseline_policies import baseline_trees

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import best_policy, policy_value
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy

__all__ = ["KINDS", "Kind", "Value", "Variant", "plan_of", "trees_of", "value_of"]

Kind = Literal["chain", "full", "random", "paper", "ours"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Trees = tuple[tuple[SparseTree, ...], ...]

_CONSTANT = LatencyCurve.constant()


@dataclass(frozen=True)
class Variant:
    """What is compared: trees of a kind, and what their guesses are made from."""

    kind: Kind
    bigram: bool
    """The bigram table is used."""
    ngram: bool
    """Earlier matches are used."""
    rows: int
    """Most rows of a tree."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def all(
        cls,
        kinds: tuple[Kind, ...],
        rows: tuple[int, ...],
        sources: tuple[tuple[bool, bool], ...],
    ) -> Iterator[Variant]:
        """Every combination. `sources`: pairs of (bigram, ngram)."""
        for bigram, ngram in sources:
            for count in rows:
                for kind in kinds:
                    yield cls(kind, bigram, ngram, count)


def trees_of(
    kind: Kind, acceptance: AcceptanceModel, rows: int, num_ept: int = 1, seed: int = 0
) -> Trees:
    """[match classes][m + 1] the trees of a kind.

    - ours: the best there are (`evidence_search`).
    - chain: the best of those with one candidate per depth: the earlier text's token
      where there is a match, else the likeliest guess of a prompt row.
    - paper, full, random (`baseline_policies`): they know of depths and ranks only.
      For each match class they get the chances along the chain, in which the earlier
      text's token is rank 0. They reach no deeper than prompt rows do.

    acceptance: chances, with classes where earlier matches are used.
    seed: of random trees.
    """
    if kind == "ours":
        return best_policy(acceptance, _CONSTANT, rows, num_ept).trees
    if kind == "chain":
        return best_policy(_only_first(acceptance), _CONSTANT, rows, num_ept).trees
    return tuple(
        baseline_trees(kind, _table(acceptance, match_class), rows, num_ept, seed)
        for match_class in range(acceptance.num_classes)
    )


def _only_first(acceptance: AcceptanceModel) -> AcceptanceModel:
    """The same where no second child of a node is ever right."""

    def first(table: np.ndarray) -> np.ndarray:
        only = np.zeros_like(table)
        only[..., 0] = table[..., 0]
        return only

    return replace(
        acceptance,
        prompted=first(acceptance.prompted),
        unprompted=np.zeros_like(acceptance.unprompted),
        beside=np.zeros_like(acceptance.beside),
    )


def _table(acceptance: AcceptanceModel, match_class: int) -> AcceptanceStats:
    """Chances by depth and rank along the chain, or without one in class 0."""
    m = acceptance.num_prompt_tokens
    return AcceptanceStats(
        np.stack([acceptance.chances(m, match_class, d, True) for d in range(1, m + 1)])
    )


@dataclass(frozen=True)
class Value:
    """What trees are expected to do: tokens and rows per step."""

    tau: float
    mean_rows: float


def value_of(trees: Trees, acceptance: AcceptanceModel) -> Value:
    tau, _, shares = policy_value(trees, acceptance, _CONSTANT)
    rows = np.array([[tree.num_rows for tree in row] for row in trees])
    return Value(tau, float((shares * rows).sum()))


def plan_of(trees: Trees) -> TreePlan:
    """The trees for every load, as a server reads them."""
    policies = tuple(
        TreePolicy(tuple(SparseTree(*tree) for tree in row)) for row in trees
    )
    return TreePlan((Tier(None, policies),))
