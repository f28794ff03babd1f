"""Random trees, steps and draft inputs for the kernel tests."""

from __future__ import annotations

import random

import numpy as np
import torch

from tests.unit.test_tree import random_tree
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.drafting import DraftInputs
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

FIRST_SOFT_ID = 1000


def tree_of_depth(depth: int, nodes: int, num_prompts: int, ept: int) -> SparseTree:
    """A tree at most `depth` deep; some nodes carry prompt tokens."""
    parents, ranks, depths, children = [], [], [0], [0]
    for _ in range(nodes - 1):
        parent = random.choice([n for n, d in enumerate(depths) if d < depth])
        parents.append(parent)
        # Every other rank is skipped now and then.
        children[parent] += random.choice([1, 1, 2])
        ranks.append(children[parent] - 1)
        depths.append(depths[parent] + 1)
        children.append(0)
    prompts = [random.randint(0, num_prompts) for _ in depths]
    return SparseTree(tuple(parents), tuple(ranks), tuple(prompts), ept)


def random_policy(num_prompts: int = 3, nodes: int = 9, ept: int = 1) -> TreePolicy:
    """A tree for each num_prompted; that for 0 is the root and its prompt rows."""
    trees = [SparseTree((), (), (num_prompts,), ept)]
    for depth in range(1, num_prompts + 1):
        size = random.randint(2, nodes)
        trees.append(tree_of_depth(depth, size, num_prompts, ept))
    return TreePolicy(tuple(trees))


def random_menu(rng: np.random.Generator, num_prompts: int, classes: int) -> TreeMenu:
    """At least one entry; each has a policy for every n-gram match class."""
    entries = {}
    for _ in range(2):
        policies = []
        for _ in range(classes):
            trees = [random_tree(rng) for _ in range(num_prompts)]
            policies.append(TreePolicy((chain_tree(0, (num_prompts,)), *trees)))
        entry = MenuEntry(tuple(policies))
        entries[entry.num_draft_tokens] = entry
    return TreeMenu(tuple(entries[length] for length in sorted(entries)))


def random_drafting(
    seed: int, with_table: bool = True
) -> tuple[TreeTables, BigramTable | None, np.ndarray, DraftInputs]:
    """Tables, a bigram table, [B] tree ids and what their draft tokens depend on."""
    rng = np.random.default_rng(seed)
    vocabulary, m = 200, 3
    tables = TreeTables(random_menu(rng, m, int(rng.integers(1, 4))), vocabulary)
    table = None
    if with_table:
        ids = np.stack([rng.permutation(vocabulary)[:8] for _ in range(vocabulary)])
        table = BigramTable(
            ids,
            rng.normal(size=(vocabulary, 8)) * 2,
            rng.normal(size=vocabulary) - 3,
            tuple(rng.random(m)),
            np.full(vocabulary, 1 / vocabulary),
        )
    batch = int(rng.integers(1, 6))
    trees = rng.integers(0, len(tables.num_rows), batch)
    num_prompted = rng.integers(0, m + 1, batch)
    ngrams = rng.integers(0, vocabulary, (batch, 4))
    ngrams[np.arange(4) >= rng.integers(0, 5, batch)[:, None]] = -1
    logits = rng.normal(size=(num_prompted.sum(), vocabulary)) * 3
    inputs = DraftInputs(
        num_prompted,
        torch.from_numpy(logits).float(),
        rng.integers(0, vocabulary, batch),
        ngrams,
    )
    return tables, table, trees, inputs


def tables_of(policy: TreePolicy, num_rows: int | None = None) -> TreeTables:
    return TreeTables(policy, FIRST_SOFT_ID, num_rows)


def random_rows(tables: TreeTables, tree_ids: np.ndarray) -> np.ndarray:
    """[B] scheduled rows: the whole tree, cut anywhere, or with fillers behind."""
    rows = []
    for tree in tree_ids:
        whole = int(tables.num_rows[tree])
        cut = random.randint(1, whole)
        rows.append(random.choice([whole, cut, 1, tables.depths.shape[1]]))
    return np.array(rows)
