"""Tree tables on the device: what the kernels read about a request's tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_ppd.trees.layout import TreeTables

_TENSORS = [
    *("num_nodes", "num_rows", "parents", "node_depths", "node_ranks", "on_ngram"),
    *("prompts", "first_prompt_rows", "depths"),
]


@dataclass(frozen=True)
class DeviceTables:
    """`TreeTables` as tensors. S trees, N nodes, Q rows, W = ceil(Q / 64) mask words.

    A *tree id* is an index on axis S; for the tables of one policy it is num_prompted.
    """

    num_nodes: torch.Tensor  # int32 [S]
    num_rows: torch.Tensor  # int32 [S]
    parents: torch.Tensor  # int32 [S, N]: -1 for the root and for padding
    node_depths: torch.Tensor  # int32 [S, N]: 0 for the root and for padding
    node_ranks: torch.Tensor  # int32 [S, N]: likewise
    on_ngram: torch.Tensor  # int32 [S, N]: 1 where the first child is the n-gram draft
    prompts: torch.Tensor  # int32 [S, N]: prompt tokens per node, 0 padded
    first_prompt_rows: torch.Tensor  # int32 [S, N]: first prompt row of each node
    depths: torch.Tensor  # int32 [S, Q]: row position minus root position
    soft_ids: torch.Tensor  # int64 [S, Q]: embedding id of prompt rows, else 0
    ancestors: torch.Tensor  # int64 [S, Q, W]: in-tree rows that a row sees, and itself
    num_ept: int  # rows per prompt token
    max_depth: int  # depth D of the deepest tree
    num_prompt_tokens: int  # prompt tokens M that any node can have

    @classmethod
    def on(cls, device: torch.device | str, tables: TreeTables) -> DeviceTables:
        """Copy the tables of a policy or a menu to a device."""

        def copy(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(getattr(tables, name)).to(device, dtype)

        return cls(
            **{name: copy(name, torch.int32) for name in _TENSORS},
            soft_ids=copy("soft_ids", torch.int64),
            ancestors=copy("ancestors", torch.int64),
            num_ept=tables.num_ept,
            max_depth=tables.max_depth,
            num_prompt_tokens=int(tables.prompts.max()),
        )
