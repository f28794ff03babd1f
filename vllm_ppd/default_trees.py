"""The trees used when the user names none: small, and right for any model.

Until a hardware profile says otherwise, the trees are the best ones for a fixed
number of rows and average acceptance (measured for these prompt tokens where an
acceptance.json lies beside them).
"""

from __future__ import annotations

from vllm_ppd.config import PPDConfigError
from vllm_ppd.tree import SparseTree, TreePolicy, chain_tree

# Rows a step can take before it gets much slower than a plain one: two CPU cores are
# compute-bound from about 8 rows on, a GPU has slack for many more.
DEFAULT_ROWS = {"cpu": 8, "cuda": 32}


def default_policy(
    num_prompt_tokens: int, num_ept: int, device: str, max_rows: int | None = None
) -> TreePolicy:
    """A policy of at most ``max_rows`` rows (root included) in every state.

    Raises:
        PPDConfigError: not even one prompt token fits.
    """
    rows = max_rows or DEFAULT_ROWS.get(device, DEFAULT_ROWS["cpu"])
    if rows < 1 + num_ept:
        raise PPDConfigError(
            f"num_speculative_tokens is {rows - 1}, too small for any tree: one "
            f"prompt token takes {num_ept} row{'s' * (num_ept > 1)}; allow at least "
            f"{num_ept}, or leave it out"
        )
    m, e = num_prompt_tokens, num_ept
    trees = []
    for state in range(m + 1):
        chain = min(state, max(0, (rows - 1 - e)))
        spare = (rows - 1 - chain) // e
        prompts = [0] * (chain + 1)
        while spare > 0 and min(prompts) < m:
            for node in range(chain + 1):
                if spare > 0 and prompts[node] < m:
                    prompts[node] += 1
                    spare -= 1
        trees.append(chain_tree(chain, prompts, e))
    return TreePolicy(tuple(trees))


__all__ = ["DEFAULT_ROWS", "SparseTree", "default_policy"]
