"""Trees walked over texts: what a policy accepts, without an engine.

`policy_value` predicts the acceptance length from marginal rates and takes distances to
be independent. Where the rank of every true token is known at every place of a text,
the decoding itself can be followed: each step's tree, where its walk ends, the state it
leaves. For greedy text of the model this is what an engine does, rounding apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_ppd.trees.plain_tree import TreeLike

__all__ = ["mean_acceptance_length", "walk_text"]


def walk_text(trees: Sequence[TreeLike], ranks: np.ndarray) -> tuple[int, int]:
    """Tokens and steps of one text, from state 0 until it is known no further.

    Args:
        trees: [m + 1] one per state.
        ranks: int [n, m]; `ranks[p, d - 1]` is the rank that token p + 1 + d has among
            the candidates of prompt token d inserted at p. Token 0 is the first root.
    """
    children = [
        {
            (parent, rank): node
            for node, (parent, rank) in enumerate(
                zip(tree.parents, tree.ranks, strict=True), start=1
            )
        }
        for tree in trees
    ]
    tokens = steps = 0
    state, root, before = 0, 0, -1
    # Ended by where a step begins, not by how far it gets: that would count long steps
    # at the end less often than short ones.
    while root + ranks.shape[1] < len(ranks):
        node = depth = 0
        # `before` is where the last walk ended; its prompt rows fill this tree.
        while depth < state:
            child = children[state].get((node, int(ranks[before, depth])))
            if child is None:
                break
            node, depth = child, depth + 1
        tokens += depth + 1
        steps += 1
        state = trees[state].prompts[node]
        before = root + depth
        root = before + 1
    return tokens, steps


def mean_acceptance_length(
    trees: Sequence[TreeLike], texts: Sequence[np.ndarray]
) -> float:
    """Tokens per step over all texts (see `walk_text`).

    Raises ValueError when no text is long enough for a step.
    """
    walked = [walk_text(trees, ranks) for ranks in texts]
    steps = sum(steps for _, steps in walked)
    if not steps:
        raise ValueError("no text is long enough for a single decode step")
    return sum(tokens for tokens, _ in walked) / steps
