"""Random policies and steps for the kernel tests."""

from __future__ import annotations

import random

import numpy as np

from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy

FIRST_SOFT_ID = 1000


def random_tree(state: int, nodes: int, num_prompts: int, ept: int) -> SparseTree:
    """A tree at most `state` deep; some nodes carry prompt tokens."""
    parents, ranks, depths, children = [], [], [0], [0]
    for _ in range(nodes - 1):
        parent = random.choice([n for n, d in enumerate(depths) if d < state])
        parents.append(parent)
        # Every other rank is skipped now and then.
        children[parent] += random.choice([1, 1, 2])
        ranks.append(children[parent] - 1)
        depths.append(depths[parent] + 1)
        children.append(0)
    prompts = [random.randint(0, num_prompts) for _ in depths]
    return SparseTree(tuple(parents), tuple(ranks), tuple(prompts), ept)


def random_policy(states: int = 3, nodes: int = 9, ept: int = 1) -> TreePolicy:
    """Trees for states 0..`states`; state 0's is the root and its prompt tokens."""
    trees = [SparseTree((), (), (states,), ept)]
    for state in range(1, states + 1):
        trees.append(random_tree(state, random.randint(2, nodes), states, ept))
    return TreePolicy(tuple(trees))


def random_plan(ept: int) -> TreePlan:
    """Two loads and three match classes, whose trees are numbered on and on."""
    return TreePlan(
        tuple(
            Tier(most, tuple(random_policy(3, 10, ept) for _ in range(3)))
            for most in (2, None)
        )
    )


def tables_of(policy: TreePolicy, num_rows: int | None = None) -> TreeTables:
    return TreeTables(policy, FIRST_SOFT_ID, num_rows)


def random_rows(tables: TreeTables, states: np.ndarray) -> np.ndarray:
    """[B] scheduled rows: the whole tree, cut anywhere, or with fillers behind."""
    rows = []
    for state in states:
        whole = int(tables.num_rows[state])
        cut = random.randint(1, whole)
        rows.append(random.choice([whole, cut, 1, tables.depths.shape[1]]))
    return np.array(rows)
