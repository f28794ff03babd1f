"""Trees and policies: rows, masks, prefixes, order, and what is refused."""

import numpy as np
import pytest

from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy, chain_tree

# root -> a, b; a -> c.  Prompt tokens: 2 on the root, 1 on a, 0 on b, 1 on c.
SMALL = SparseTree((0, 0, 1), (0, 1, 0), (2, 1, 0, 1))


def random_tree(
    rng: np.random.Generator, num_ept: int = 1, most_nodes: int = 8, prompts: int = 3
) -> SparseTree:
    """At most so many nodes, and prompt tokens on each; ranks may have gaps. At least
    two rows, or none but the root's and prompt rows."""
    nodes = int(rng.integers(1 if prompts else 2, most_nodes + 1))
    step = int(rng.integers(1, 3))
    parents = [int(rng.integers(0, i + 1)) for i in range(nodes - 1)]
    ranks = [step * parents[:i].count(parents[i]) for i in range(nodes - 1)]
    counts = rng.integers(0, prompts + 1, nodes)
    return SparseTree(tuple(parents), tuple(ranks), tuple(counts), num_ept)


def prefix(tree: SparseTree, rows: int) -> SparseTree:
    """What vLLM leaves of a tree when it cuts the rows; incomplete ensembles go."""
    nodes = min(rows, tree.num_nodes)
    prompts = [0] * nodes
    for node, index, ept in tree.prompt_rows[: max(0, rows - tree.num_nodes)]:
        if ept == tree.num_ept - 1:
            prompts[node] = index + 1
    kept = tree.parents[: nodes - 1], tree.ranks[: nodes - 1]
    return SparseTree(*kept, tuple(prompts), tree.num_ept)


def test_rows_and_positions_of_a_small_tree():
    assert SMALL.num_nodes == 4
    assert SMALL.num_rows == 8
    assert SMALL.node_depths == (0, 1, 1, 2)
    #                 root a  b  c | r1 r2 a1 c1
    assert SMALL.row_depths.tolist() == [0, 1, 1, 2, 1, 2, 2, 3]


@pytest.mark.parametrize("num_ept", [1, 3])
def test_mask_equals_a_walk_up_the_tree(num_ept):
    rng = np.random.default_rng(0)
    for _ in range(50):
        tree = random_tree(rng, num_ept)
        rows = [("node", node) for node in range(tree.num_nodes)]
        rows += [("prompt", *row) for row in tree.prompt_rows]
        for i, row in enumerate(rows):
            seen = set()
            node = row[1]
            if row[0] == "prompt":
                seen = {("prompt", node, k, row[3]) for k in range(row[2] + 1)}
            while node is not None:
                seen.add(("node", node))
                node = tree.parents[node - 1] if node else None
            assert {rows[j] for j in np.flatnonzero(tree.mask[i])} == seen
            assert tree.row_depths[i] == len(seen) - 1


@pytest.mark.parametrize("num_ept", [1, 2])
def test_every_prefix_is_the_tree_it_claims_to_be(num_ept):
    rng = np.random.default_rng(1)
    for _ in range(30):
        tree = random_tree(rng, num_ept)
        for rows in range(1, tree.num_rows + 1):
            part = prefix(tree, rows)
            kept = part.num_rows
            # Only an incomplete ensemble at the end may be missing.
            assert rows - num_ept < kept <= rows
            assert (part.mask == tree.mask[:kept, :kept]).all()
            assert (part.row_depths == tree.row_depths[:kept]).all()


def test_the_ngram_path_is_the_rank_0_chain():
    tree = SparseTree((0, 0, 1, 1, 2), (1, 0, 0, 1, 0), (0,) * 6)
    assert tree.ngram_path == (True, False, True, False, False, True)


def test_serving_order():
    """The chain of likeliest children first, then by falling probability."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        tree = random_tree(rng)
        reached = np.ones(tree.num_nodes)
        for node, parent in enumerate(tree.parents, start=1):
            reached[node] = reached[parent] * rng.choice([0.2, 0.5, 1.0])
        tree = SparseTree(tree.parents, tree.ranks, tuple(range(tree.num_nodes)))
        served = tree.in_serving_order(reached)
        # The prompt counts tell which node went where.
        new = reached[list(served.prompts)]
        old = (-1, *tree.parents)
        for node, parent in enumerate(served.parents, start=1):
            assert old[served.prompts[node]] == served.prompts[parent]
            assert served.ranks[node - 1] == tree.ranks[served.prompts[node] - 1]
        chain = 0
        while chain in served.parents:
            children = [c for c, p in enumerate(served.parents, 1) if p == chain]
            assert chain + 1 in children
            assert new[chain + 1] == max(new[children])
            chain += 1
        assert (np.diff(new[chain + 1 :]) <= 0).all()


def test_policies_that_cannot_be_served():
    with pytest.raises(TreeError, match="puts 2 prompt tokens"):
        TreePolicy((chain_tree(0, (2,)), chain_tree(1, (1, 1))))
    with pytest.raises(TreeError, match="same num_ept"):
        TreePolicy((chain_tree(0, (1,), 2), chain_tree(1, (1, 1))))
    with pytest.raises(TreeError, match="num_prompted 1 has 130 rows; at most 129"):
        TreePolicy((chain_tree(0, (1,)), chain_tree(129, (0,) * 130)))
    with pytest.raises(TreeError, match="needs a tree for num_prompted 0"):
        TreePolicy(())
