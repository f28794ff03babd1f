"""Chains on the V2 runner: trees without siblings in the place of an entry's own."""

from __future__ import annotations

import pytest

from vllm_ppd.engine.v2.request_trees import with_chains
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree


def star(rows: int, num_ept: int = 1) -> TreePolicy:
    """Three prompt tokens; the largest tree has exactly so many rows."""
    tree = SparseTree(
        (0,) * (rows - 1), tuple(range(rows - 1)), (0,) * rows, num_ept=num_ept
    )
    return TreePolicy((chain_tree(0, (0,), num_ept), tree, tree, tree))


def chains(rows: int, num_ept: int = 1) -> TreePolicy:
    menu = TreeMenu((MenuEntry((star(rows, num_ept),)),))
    return with_chains(menu).entries[0].policies[-1]


def test_draft_tokens_first_and_one_below_the_other():
    for num_prompted, tree in enumerate(chains(16).trees):
        assert tree.parents == tuple(range(num_prompted))
        assert tree.ranks == (0,) * num_prompted
        assert tree.node_depths == tuple(range(num_prompted + 1))
    # Without prompt tokens an n-gram draft and the bigram table reach so deep.
    for rows, length in ((4, 3), (16, 8)):
        bare = MenuEntry((TreePolicy(star(rows).trees[1:2]),))
        (chain,) = with_chains(TreeMenu((bare,))).entries[0].policies[-1].trees
        assert chain == chain_tree(length, (0,) * (length + 1))


@pytest.mark.parametrize("rows", range(2, 40))
@pytest.mark.parametrize("num_ept", [1, 2, 5])
def test_as_many_rows_as_the_entry_and_prompt_tokens_on_every_node(rows, num_ept):
    policy = chains(rows, num_ept)
    assert len(policy.trees) == 4
    for tree in policy.trees:
        assert tree.num_rows <= rows
        assert max(tree.prompts) <= 3
        if rows >= 1 + num_ept:
            # One more prompt token would be a row too many, or one too many on a node.
            full = sum(tree.prompts) == 3 * tree.num_nodes
            assert full or tree.num_rows + num_ept > rows
            assert min(tree.prompts) >= 1
        assert max(tree.prompts) - min(tree.prompts) <= 1


def test_every_entry_gets_chains_as_its_last_match_class():
    small, large = star(4), star(9)
    menu = TreeMenu((MenuEntry((small, small)), MenuEntry((small, large), 1.5)))
    extended = with_chains(menu)
    assert extended.draft_lengths == menu.draft_lengths
    for entry, original in zip(extended.entries, menu.entries, strict=True):
        assert entry.policies[:-1] == original.policies
        assert entry.policies[-1] == chains(original.max_rows)
        assert entry.acceptance_length == original.acceptance_length
