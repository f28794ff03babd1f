"""A step's trees in the persistent buffers on the device: the torch reference.

vLLM lays the rows of a request out as a sequence. For requests with a tree this
writes the positions, masks and depths that the model and its attention read.
"""

from __future__ import annotations

import torch

from vllm_ppd.kernels.device_tables import DeviceTables

__all__ = ["place_tree_reference"]


def place_tree_reference(
    tables: DeviceTables,
    trees: torch.Tensor,  # int [B]: tree id of each request
    num_rows: torch.Tensor,  # int [B]: tree rows; 0: no tree, or a padded request
    query_starts: torch.Tensor,  # int [B + 1]: first row of each request, and the end
    seq_lens: torch.Tensor,  # int [B]: cached tokens and this step's rows
    positions: torch.Tensor,  # int [>= T]: changed at tree rows
    ancestors: torch.Tensor,  # int64 [T, W]: written at tree rows
    depths: torch.Tensor,  # int32 [T]: written at tree rows
    starts: torch.Tensor,  # int32 [B]: written, row of each root
    context_lens: torch.Tensor,  # int32 [B]: written, cached tokens before the root
) -> None:
    """Write what `TreeBatch` needs, and each tree row's position.

    A tree is the last ``num_rows`` rows of its request. The root's position is right
    already, and the others follow from it. `num_rows` must not exceed the tables'
    rows; rows past the tree's end see the root and themselves.
    """
    trees, num_rows = trees.long(), num_rows.long()
    ends = query_starts[1:].long()
    roots = ends - num_rows
    starts.copy_(roots)
    context_lens.copy_(torch.where(num_rows > 0, seq_lens - num_rows, 0))
    # The request of every row; the last one for rows past the step's end.
    row = torch.arange(len(depths), device=trees.device)
    request = torch.searchsorted(ends, row, right=True).clamp(max=len(trees) - 1)
    inner = row - roots[request]
    in_tree = (inner >= 0) & (inner < num_rows[request])
    cell = trees[request], inner.clamp(0, tables.depths.shape[1] - 1)
    depth = tables.depths[cell]
    root_position = positions[roots[request].clamp(0, len(row) - 1)]
    sequence = positions[: len(row)]
    sequence.copy_(torch.where(in_tree, root_position + depth, sequence))
    depths.copy_(torch.where(in_tree, depth, depths))
    ancestors.copy_(torch.where(in_tree[:, None], tables.ancestors[cell], ancestors))
