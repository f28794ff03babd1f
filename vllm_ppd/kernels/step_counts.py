"""What a verified step adds to `vllm_ppd.engine.step_counts.StepCounts`, on the device.

The same sums as `StepCounts.add`, as tensors of fixed shapes: no value is read on the
host.
"""

from __future__ import annotations

import torch

from vllm_ppd.engine.step_counts import SOURCES, Slot
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_walk import Walk

__all__ = ["count_step"]


def count_step(
    counts: torch.Tensor,  # int64 [Slot.FIRST_STATE + states]: added to
    tables: DeviceTables,
    tree_states: torch.Tensor,  # int64 [S]: the state that each tree is for
    trees: torch.Tensor,  # int64 [B]: tree id of each request
    num_rows: torch.Tensor,  # int [B]: scheduled tree rows, at least 1
    walk: Walk,
) -> None:
    """Add one step; `Slot.TIER` and `Slot.CHANGES` are left alone."""
    states = tree_states[trees]
    nodes = torch.minimum(num_rows, tables.num_nodes[trees])
    # Rows behind a bare root are padding.
    guessing = torch.minimum(num_rows, tables.num_rows[trees]) > 1
    level = torch.arange(walk.paths.shape[1], device=trees.device)
    accepted = (level > 0) & (level < walk.num_sampled[:, None])
    on_chain = tables.on_chain[trees].gather(1, walk.paths.long()) > 0
    chain = accepted & on_chain
    prompted = accepted & ~on_chain & (level <= states[:, None])
    chains, prompts, speculating = chain.sum(), prompted.sum(), guessing.sum()
    sources = {
        "prompt_tokens": prompts,
        "bigram": accepted.sum() - chains - prompts,
        "earlier_text": chains,
    }
    batch = len(trees)
    nothing = torch.zeros_like(speculating)
    counts[: Slot.FIRST_STATE] += torch.stack(
        [
            speculating,
            batch - speculating,
            walk.num_sampled.sum(),
            num_rows.sum(),
            nodes.sum() - batch,
            nothing,
            nothing,
            *(sources[name] for name in SOURCES),
        ]
    )
    counts[Slot.FIRST_STATE :].scatter_add_(0, states, guessing.to(counts.dtype))
