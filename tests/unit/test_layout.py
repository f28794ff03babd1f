"""Layout, verification and KV moves against brute-force oracles."""

import numpy as np
import pytest

from tests.kernels.trees import random_policy
from tests.unit.test_tree import prefix
from vllm_ppd.trees.layout import TreeStep, TreeTables, spread
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree
from vllm_ppd.trees.verify import TreeWalk, kv_moves

VOCABULARY = 100
# root -> a, b; a -> c.  Prompt tokens: 2 on the root, 1 on a, b and c.
SMALL = SparseTree((0, 0, 1), (0, 1, 0), (2, 1, 1, 1))
POLICY = TreePolicy((chain_tree(0, (2,)), chain_tree(1, (1, 1)), SMALL))
TABLES = TreeTables(POLICY, VOCABULARY)


def test_spread():
    values = np.array([[1, 2], [3, 4]])
    assert spread(values, np.array([2, 0]), 3).tolist() == [[3, 4], [0, 0], [1, 2]]


def test_a_small_step():
    # Request 0 runs tree 2 at row 3, request 1 only its root at row 12.
    step = TreeStep(TABLES, np.array([2, 0]), np.array([3, 12]), np.array([9, 1]))
    assert step.node_rows.tolist() == [3, 4, 5, 6, 12]
    rows, tree_ids, inner = step.tree_rows()
    assert rows.tolist() == list(range(3, 12))
    assert TABLES.depths[tree_ids, inner].tolist() == [0, 1, 1, 2, 1, 2, 2, 2, 3]
    # The target follows root -> b; nothing hangs on b, so its token ends the step.
    walk = TreeWalk(step, np.array([1, 7, 8, 9, 1]))
    walk.run_greedy(np.array([8, 9, 42, 0, 5]))
    assert walk.tokens_out.tolist() == [[8, 42, -1], [5, -1, -1]]
    assert walk.lengths.tolist() == [2, 1]
    assert walk.nodes.tolist() == [2, 0]
    # b sits in row 2 of the tree and belongs in row 1.
    sources, targets = kv_moves(step, walk)
    assert (sources.tolist(), targets.tolist()) == ([5], [4])
    rows, counts = step.prompt_rows(walk.nodes)
    assert (rows.tolist(), counts.tolist()) == ([10], [1, 0])


def test_tables_of_a_menu():
    fork = TreePolicy((chain_tree(0, (1,)), SparseTree((0, 0, 1), (0, 1, 0), (1,) * 4)))
    menu = TreeMenu((MenuEntry((fork, fork)),))
    tables = TreeTables(menu, first_soft_id=100)
    # Tree 0 is root-only; 1 and 2 are of match class 0, 3 and 4 of class 1.
    assert tables.num_rows.tolist() == [1, 2, 8, 2, 8]
    assert tables.soft_ids[2].tolist() == [0] * 4 + [100] * 4
    # The n-gram draft is the first child of the first child. Node 3 is below node 1.
    assert tables.on_ngram[2].tolist() == [False] * 4
    assert tables.on_ngram[4].tolist() == [True, True, False, True]
    assert tables.max_children == 2


def test_soft_ids_are_prompt_major_and_ept_minor():
    tree = chain_tree(1, (2, 1), num_ept=2)
    tables = TreeTables(TreePolicy((tree, tree, tree)), 100, num_rows=10)
    assert tables.soft_ids[0].tolist() == [0, 0, 100, 101, 102, 103, 100, 101, 0, 0]
    assert tables.depths[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 1, 1]


def oracle(tree: SparseTree, tokens: list[int], picked: list[int]):
    """Walk one tree node by node."""
    node, out, path = 0, [picked[0]], [0]
    while True:
        children = [c + 1 for c, parent in enumerate(tree.parents) if parent == node]
        follow = [c for c in children if tokens[c] == picked[node]]
        if not follow:
            return out, path, node
        node = follow[0]
        path.append(node)
        out.append(picked[node])


@pytest.mark.parametrize("num_ept", [1, 2])
def test_batches_of_cut_trees_equal_a_walk_of_each(num_ept):
    rng = np.random.default_rng(3)
    for _ in range(40):
        policy = random_policy(rng, ept=num_ept)
        trees, tables = policy.trees, TreeTables(policy, VOCABULARY)
        batch = int(rng.integers(1, 7))
        tree_ids = rng.integers(0, 4, batch)
        num_rows = np.array([rng.integers(1, trees[s].num_rows + 1) for s in tree_ids])
        gaps = rng.integers(0, 5, batch)
        starts = np.cumsum(gaps + num_rows) - num_rows
        step = TreeStep(tables, tree_ids, starts, num_rows)
        # Few token values, so that siblings often differ and paths often match.
        tokens, picked = [], []
        for nodes in step.num_nodes:
            tokens.append(rng.permutation(12)[:nodes].tolist())
            picked.append(rng.integers(0, 12, nodes).tolist())
        walk = TreeWalk(step, np.concatenate(tokens))
        walk.run_greedy(np.concatenate(picked))
        slots = {}
        for b, (tree_id, rows) in enumerate(zip(tree_ids, num_rows, strict=True)):
            part = prefix(trees[tree_id], int(rows))
            out, path, node = oracle(part, tokens[b], picked[b])
            assert walk.tokens_out[b, : walk.lengths[b]].tolist() == out
            assert (walk.tokens_out[b, walk.lengths[b] :] == -1).all()
            assert walk.nodes[b] == node
            slots.update({starts[b] + d: starts[b] + n for d, n in enumerate(path)})
            # Its prompt rows, complete ensembles only.
            first = starts[b] + part.num_nodes + num_ept * sum(part.prompts[:node])
            count = part.prompts[node] * num_ept
            one = TreeStep(tables, tree_ids[[b]], starts[[b]], num_rows[[b]])
            prompt_rows, counts = one.prompt_rows(walk.nodes[[b]])
            assert prompt_rows.tolist() == list(range(first, first + count))
            assert counts.tolist() == [part.prompts[node]]
        # Copying in order leaves every accepted node where its depth says.
        memory = np.arange(int(starts[-1] + num_rows[-1]))
        for source, target in zip(*kv_moves(step, walk), strict=True):
            memory[target] = memory[source]
        assert {t: memory[t] for t in slots} == slots


def test_a_padded_first_step_has_inert_rows():
    tables = TreeTables(POLICY, VOCABULARY, num_rows=12)
    step = TreeStep(tables, np.array([0]), np.array([0]), np.array([12]))
    assert step.num_nodes.tolist() == [1]
    walk = TreeWalk(step, np.array([1]))
    walk.run_greedy(np.array([5]))
    rows, counts = step.prompt_rows(walk.nodes)
    assert (rows.tolist(), counts.tolist()) == ([1, 2], [2])
    # Fillers see the root and themselves; no other row sees them.
    for row in range(3, 12):
        assert tables.ancestors[0, row, 0] == 1 | (1 << row)
    assert (tables.ancestors[0, :3, 0] < 8).all()
