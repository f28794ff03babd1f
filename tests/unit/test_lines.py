"""Lines: trees without siblings that stand in for a policy's own."""

from __future__ import annotations

import pytest

from vllm_ppd.engine.v2.lines import line_policy, with_lines
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree


def policy(rows: int, num_ept: int = 1) -> TreePolicy:
    """Three prompt tokens; the largest tree has exactly so many rows."""
    star = SparseTree(
        (0,) * (rows - 1), tuple(range(rows - 1)), (0,) * rows, num_ept=num_ept
    )
    return TreePolicy((chain_tree(0, (0,), num_ept), star, star, star))


def test_candidates_first_and_one_below_the_other():
    for state, tree in enumerate(line_policy(policy(16)).trees):
        assert tree.parents == tuple(range(state))
        assert tree.ranks == (0,) * state
        assert tree.node_depths == tuple(range(state + 1))


@pytest.mark.parametrize("rows", range(1, 40))
@pytest.mark.parametrize("num_ept", [1, 2, 5])
def test_as_many_rows_as_the_policy_and_guesses_wherever_a_step_ends(rows, num_ept):
    lines = line_policy(policy(rows, num_ept))
    assert len(lines.trees) == 4
    for tree in lines.trees:
        assert tree.num_rows <= rows
        assert max(tree.prompts) <= 3
        if rows >= 1 + num_ept:
            # One more prompt token would be a row too many, or one too many on a node.
            full = sum(tree.prompts) == 3 * tree.num_nodes
            assert full or tree.num_rows + num_ept > rows
            assert min(tree.prompts) >= 1
        assert max(tree.prompts) - min(tree.prompts) <= 1


def test_a_plan_gets_lines_as_its_last_match_class():
    small = TreePolicy((chain_tree(0, (1,)), chain_tree(1, (1, 1))))
    plan = with_lines(TreePlan((Tier(4, (small, small)), Tier(None))))
    assert plan.tiers[1].policies == ()
    assert plan.tiers[0].policies == (small, small, line_policy(small))
