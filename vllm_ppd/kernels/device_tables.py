"""Trees as tensors: what the kernels look up about a request's tree.

A *tree id* is an index on the tree axis S of the tables that this copies; for the
tables of a single policy it is the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_ppd.trees.layout import TreeTables

__all__ = ["DeviceTables"]


@dataclass(frozen=True)
class DeviceTables:
    """Axes: S trees, N nodes, Q rows, W = ceil(Q / 64) mask words.

    Attributes:
        num_nodes, num_rows: int32 [S].
        parents: int32 [S, N] parent node; -1 for the root and for padding.
        node_depths, node_ranks: int32 [S, N]; 0 for root and padding.
        on_ngram: int32 [S, N] 1 where children follow an earlier match first.
        prompts: int32 [S, N] prompt tokens per node; 0 padded.
        first_prompt_rows: int32 [S, N] first prompt row of each node.
        depths: int32 [S, Q] row position minus root position.
        soft_ids: int64 [S, Q] id of a prompt row's embedding, 0 for other rows.
        ancestors: int64 [S, Q, W] in-tree rows that a row sees, itself included.
        num_ept: rows per prompt token.
        max_depth: depth D of the deepest tree.
        num_prompt_tokens: prompt tokens M that any node can have.
    """

    num_nodes: torch.Tensor
    num_rows: torch.Tensor
    parents: torch.Tensor
    node_depths: torch.Tensor
    node_ranks: torch.Tensor
    on_ngram: torch.Tensor
    prompts: torch.Tensor
    first_prompt_rows: torch.Tensor
    depths: torch.Tensor
    soft_ids: torch.Tensor
    ancestors: torch.Tensor
    num_ept: int
    max_depth: int
    num_prompt_tokens: int

    @classmethod
    def on(cls, device: torch.device | str, tables: TreeTables) -> DeviceTables:
        """Copy a policy's or a plan's tables to a device."""

        def copy(name: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.from_numpy(getattr(tables, name)).to(device, dtype)

        return cls(
            num_nodes=copy("num_nodes"),
            num_rows=copy("num_rows"),
            parents=copy("parents"),
            node_depths=copy("node_depths"),
            node_ranks=copy("node_ranks"),
            on_ngram=copy("on_ngram"),
            prompts=copy("prompts"),
            first_prompt_rows=copy("first_prompt_rows"),
            depths=copy("depths"),
            soft_ids=copy("soft_ids", torch.int64),
            ancestors=copy("ancestors", torch.int64),
            num_ept=tables.num_ept,
            max_depth=tables.max_depth,
            num_prompt_tokens=int(tables.prompts.max()),
        )
