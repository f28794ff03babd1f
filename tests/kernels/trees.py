"""Random trees, steps and draft inputs for the kernel tests."""

from __future__ import annotations

import numpy as np
import torch

from tests.unit.test_tree import random_tree
from vllm_ppd.trees.bigram import BigramTable
from vllm_ppd.trees.drafting import DraftInputs
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import TreePolicy, chain_tree

FIRST_SOFT_ID = 1000


def random_policy(
    rng: np.random.Generator, num_prompts: int = 3, nodes: int = 9, ept: int = 1
) -> TreePolicy:
    """A tree for each num_prompted; that for 0 is the root and its prompt rows, if
    there are prompt tokens."""
    if not num_prompts:
        return TreePolicy((random_tree(rng, ept, nodes, 0),))
    trees = [random_tree(rng, ept, nodes, num_prompts) for _ in range(num_prompts)]
    return TreePolicy((chain_tree(0, (num_prompts,), ept), *trees))


def random_menu(rng: np.random.Generator, num_prompts: int, classes: int) -> TreeMenu:
    """At least one entry; each has a policy for every n-gram match class."""
    entries = {}
    for _ in range(2):
        policies = [random_policy(rng, num_prompts, 8) for _ in range(classes)]
        entry = MenuEntry(tuple(policies))
        entries[entry.num_draft_tokens] = entry
    return TreeMenu(tuple(entries[length] for length in sorted(entries)))


def random_drafting(
    seed: int, with_table: bool = True, m: int = 3
) -> tuple[TreeTables, BigramTable | None, np.ndarray, DraftInputs]:
    """Tables, a bigram table, [B] tree ids and what their draft tokens depend on."""
    rng = np.random.default_rng(seed)
    vocabulary = 200
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


def random_rows(
    rng: np.random.Generator, tables: TreeTables, tree_ids: np.ndarray
) -> np.ndarray:
    """[B] scheduled rows: the whole tree, cut anywhere, or with fillers behind."""
    rows = []
    for whole in tables.num_rows[tree_ids].tolist():
        cut = int(rng.integers(1, whole + 1))
        rows.append(int(rng.choice([whole, cut, 1, tables.depths.shape[1]])))
    return np.array(rows)
