"""What a walk adds to `vllm_ppd.adaptive.learning.EvidenceLearner`, on the device.

The counts of `EvidenceLearner.observe_walk`, as tensors of fixed shapes: no value is
read on the host.
"""

from __future__ import annotations

import torch

from vllm_ppd.adaptive.learning import Places
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_walk import Walk

__all__ = ["count_evidence"]


def count_evidence(
    tries: torch.Tensor,  # int64 [places + 1]: added to; the last one is a bin
    hits: torch.Tensor,  # int64 [places + 1]
    places: Places,
    tables: DeviceTables,
    tree_states: torch.Tensor,  # int64 [S]: the state that each tree is for
    tree_classes: torch.Tensor,  # int64 [S]: its match class; -1 is not counted
    trees: torch.Tensor,  # int64 [B]: tree id of each request
    num_rows: torch.Tensor,  # int [B]: scheduled tree rows
    walk: Walk,
) -> None:
    """Count the candidates below every visited node of one step."""
    m, ranks, _, depths = places
    _, unprompted, chains, besides, nowhere = places.firsts.tolist()
    states, classes = tree_states[trees][:, None], tree_classes[trees][:, None]
    parents = tables.parents[trees].long()  # [B, N], as all below
    width = parents.shape[1]
    node = torch.arange(width, device=trees.device)
    level = torch.arange(walk.paths.shape[1], device=trees.device)
    reached = torch.where(level < walk.num_sampled[:, None], walk.paths, 0)
    # One more column takes what is to be left out.
    flags = torch.zeros(len(trees), width + 1, dtype=torch.bool, device=trees.device)
    visited = flags.scatter(1, reached.long(), True)[:, :width]
    nodes = torch.minimum(num_rows, tables.num_nodes[trees])
    above = parents.clamp(min=0)
    tried = (node < nodes[:, None]) & (parents >= 0) & (classes >= 0)
    tried &= visited.gather(1, above)
    hit = visited & tried

    depth = tables.node_depths[trees].long() - 1
    rank = tables.node_ranks[trees].long()
    match = classes - 1
    on = (tables.on_chain[trees].gather(1, above) > 0) & (match >= 0)
    prompted = depth < states
    first = on & (rank == 0)
    # Beside a chain's token that was right, nothing else was put to the test.
    ended = torch.where(first & hit, above, width)
    went_on = flags.scatter(1, ended, True).gather(1, above)
    rank = rank - on.long()
    usual = tried & ~on & (rank < ranks)
    beside = tried & on & ~first & prompted & (rank < ranks) & ~went_on
    chain = tried & first & (depth < depths)
    at_beside = (match * m + depth.clamp(max=m - 1)) * ranks + rank
    place = torch.full_like(rank, nowhere)
    place = torch.where(usual & prompted, depth * ranks + rank, place)
    place = torch.where(usual & ~prompted, unprompted + rank, place)
    place = torch.where(chain, chains + match * depths + depth, place)
    place = torch.where(beside, besides + at_beside, place).flatten()
    tries.scatter_add_(0, place, torch.ones_like(place))
    hits.scatter_add_(0, place, hit.flatten().long())
