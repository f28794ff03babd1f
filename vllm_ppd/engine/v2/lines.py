"""Trees without siblings, for requests whose logits depend on their own history.

vLLM's penalties, bad words, thinking budgets and grammars take the rows before a row
for its history. In a tree those may be siblings; in a *line* they never are: candidate
``d`` is row ``d``, and all prompt rows come after. A line guesses less, and is right.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_ppd.trees.menu import TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree


def with_lines(plan: TreePlan) -> TreePlan:
    """The plan with one more match class in each tier that speculates: lines."""
    return TreePlan(
        tuple(
            replace(tier, policies=(*tier.policies, line_policy(tier.policies[0])))
            if tier.policies
            else tier
            for tier in plan.tiers
        )
    )


def line_policy(policy: TreePolicy) -> TreePolicy:
    """For each state a line in the place of the policy's tree.

    It has at most the rows of the policy's largest tree, at most as many candidates
    as prompt rows guess, and as many prompt tokens as fit, the first ones of every
    node first, so that the next step has guesses wherever this one ends.
    """
    return TreePolicy(
        tuple(
            _line(state, policy.max_rows, policy.num_prompt_tokens, policy.num_ept)
            for state in range(len(policy.trees))
        )
    )


def _line(
    state: int, max_rows: int, num_prompt_tokens: int, num_ept: int
) -> SparseTree:
    # One prompt token per node at least, or the guess after it would be the last.
    length = max(0, min(state, max_rows // (1 + num_ept) - 1))
    nodes = length + 1
    tokens = min((max_rows - nodes) // num_ept, nodes * num_prompt_tokens)
    each, more = divmod(tokens, nodes)
    prompts = [each + (node < more) for node in range(nodes)]
    return chain_tree(length, prompts, num_ept)
