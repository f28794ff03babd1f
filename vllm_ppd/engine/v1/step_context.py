"""What the attention layers of the current step must know about its trees.

The runner sets it before it builds attention metadata, whose builders are called by
vLLM with no room for more arguments. One model runs one step at a time per process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepContext:
    """The trees of one step. R tree requests, T rows of the whole step, W mask words.

    ``starts``, ``num_rows`` and ``context_lens`` are on the host, the rest is on the
    model's device.

    Attributes:
        requests: [R] index of each tree request in the batch.
        starts: [R] row of each root.
        num_rows: [R] rows of each tree, root included.
        context_lens: [R] KV entries before the root.
        ancestors: [T, W] int64 masks of visible in-tree rows.
        depths: [T] row position minus root position.
        only_trees: no other request runs in this step.
    """

    requests: torch.Tensor
    starts: torch.Tensor
    num_rows: torch.Tensor
    context_lens: torch.Tensor
    ancestors: torch.Tensor
    depths: torch.Tensor
    only_trees: bool


current: StepContext | None = None


def set_current(context: StepContext | None) -> None:
    global current
    current = context
