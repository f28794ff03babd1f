"""The trees of one step: where they lie among its rows, and what verification found.

vLLM passes one InputBatch through all calls of a step, so a step's `StepTrees` travels
on it. What CUDA graphs read lies in buffers that persist.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np
import torch
import vllm.utils.torch_utils as torch_utils
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_ppd.engine.v2.attention import DeviceTreeAttention
from vllm_ppd.engine.v2.request_trees import RequestTrees
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.triton.place_tree import place_tree
from vllm_ppd.kernels.triton.tree_walk import Walk
from vllm_ppd.trees.layout import ranges

_ATTRIBUTE = "ppd_step"


def step_of(batch: InputBatch) -> StepTrees | None:
    """The trees of a batch's step; None in a plain step."""
    return getattr(batch, _ATTRIBUTE, None)


@dataclass(eq=False)
class StepTrees:
    """One step's trees.

    Attributes:
        buffers: where the trees lie.
        num_reqs: B, requests of the step.
        max_rows: no request has more rows.
        only_trees: every row of the step belongs to a tree.
        row_ends: int32 [B + 1] tree rows before each request.
        row_ends_np: the same on the host.
        max_nodes: int [B], on the host: most nodes of each request's tree.
        walk: where verification ended; None before it.
    """

    buffers: StepBuffers
    num_reqs: int
    max_rows: int
    only_trees: bool
    row_ends: torch.Tensor
    row_ends_np: np.ndarray
    max_nodes: np.ndarray
    walk: Walk | None = None

    @property
    def tables(self) -> DeviceTables:
        return self.buffers.tables

    @property
    def tree_ids(self) -> torch.Tensor:
        """int64 [B]."""
        return self.buffers.tree_ids[: self.num_reqs]

    @property
    def num_rows(self) -> torch.Tensor:
        """int32 [B] scheduled rows of each tree."""
        return self.buffers.num_rows[: self.num_reqs]

    @property
    def starts(self) -> torch.Tensor:
        """int32 [B] row of each root."""
        return self.buffers.starts[: self.num_reqs]

    def num_draft_tokens(self) -> torch.Tensor:
        """int32 [B] draft tokens among the scheduled rows."""
        nodes = self.tables.num_nodes[self.tree_ids]
        return torch.minimum(nodes, self.num_rows) - 1

    def with_node_logits(self, batch: InputBatch) -> InputBatch:
        """The batch with logits for nodes only: prompt rows need theirs later, at one
        node each.

        Only the device knows how many nodes a request's tree has, so each request gets
        as many logits as the largest tree of its menu entry has nodes.
        """
        counts = np.diff(self.row_ends_np)
        kept = np.minimum(counts, self.max_nodes)
        if (kept == counts).all():
            return batch
        ends = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
        sources = ranges(self.row_ends_np[:-1], kept).astype(np.int32)
        both = torch_utils.async_tensor_h2d(
            np.concatenate([ends, sources]), device=batch.cu_num_logits.device
        )
        index = both[len(ends) :]
        nodes = replace(
            batch,
            cu_num_logits=both[: len(ends)],
            cu_num_logits_np=ends,
            logits_indices=batch.logits_indices[index],
            expanded_idx_mapping=batch.expanded_idx_mapping[index],
            expanded_local_pos=batch.expanded_local_pos[index],
        )
        setattr(nodes, _ATTRIBUTE, self)
        return nodes

    def for_stock_kernel(
        self, metadata: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """All of the step: contexts are left out on V1 only."""
        return metadata

    def attention(self, block_table: torch.Tensor) -> DeviceTreeAttention:
        """What attention layers run; `block_table` may have rows of padding."""
        buffers, num_reqs = self.buffers, len(block_table)
        return DeviceTreeAttention(
            TreeBatch(
                block_table=block_table,
                starts=buffers.starts[:num_reqs],
                num_rows=buffers.num_rows[:num_reqs],
                context_lens=buffers.context_lens[:num_reqs],
                ancestors=buffers.ancestors,
                depths=buffers.depths,
                max_rows=self.max_rows,
            )
        )


class StepBuffers:
    """Persistent device memory for the trees of the step that runs.

    Args:
        requests: the trees between steps.
        max_num_reqs: most requests of a step.
        max_num_tokens: most rows of a step.
    """

    def __init__(self, requests: RequestTrees, max_num_reqs: int, max_num_tokens: int):
        self._requests = requests
        self.tables = requests.tables
        device = self.tables.num_nodes.device
        # By request, in the batch's order.
        self.tree_ids = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self.num_rows, self.starts, self.context_lens = torch.zeros(
            3, max_num_reqs, dtype=torch.int32, device=device
        )
        # By row.
        words = self.tables.ancestors.shape[2]
        self.ancestors = torch.zeros(
            max_num_tokens, words, dtype=torch.int64, device=device
        )
        self.depths = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        self._has_trees = False

    def place(self, batch: InputBatch) -> None:
        """Lay the batch's trees out: positions, masks, and where each tree lies.

        A request without drafts is a tree cut down to its root. In a step without any
        draft nothing is done, once the trees of the step before it are gone.
        """
        if not batch.num_draft_tokens:
            self.clear()
            return
        self._has_trees = True
        num_reqs, requests = batch.num_reqs, self._requests
        counts = np.diff(batch.cu_num_logits_np)
        # Few different bounds, so that few variants of the attention kernel exist.
        bounds = requests.row_bounds
        step = StepTrees(
            self,
            num_reqs,
            max_rows=bounds[bisect_left(bounds, int(counts.max()))],
            only_trees=int(batch.cu_num_logits_np[-1]) == batch.num_tokens,
            row_ends=batch.cu_num_logits,
            row_ends_np=batch.cu_num_logits_np,
            max_nodes=requests.max_nodes[batch.idx_mapping_np],
        )
        requests.copy_ids(batch.idx_mapping, step.tree_ids)
        torch.sub(step.row_ends[1:], step.row_ends[:-1], out=step.num_rows)
        self.num_rows[num_reqs:] = 0
        place_tree(
            self.tables,
            step.tree_ids,
            step.num_rows,
            batch.query_start_loc[: num_reqs + 1],
            batch.seq_lens[:num_reqs],
            batch.positions,
            self.ancestors[: batch.num_tokens],
            self.depths[: batch.num_tokens],
            step.starts,
            self.context_lens[:num_reqs],
        )
        setattr(batch, _ATTRIBUTE, step)

    def place_for_capture(self, batch: InputBatch) -> None:
        """Let a CUDA graph that is captured for this batch find trees in the buffers
        when it is replayed; now there are none."""
        rows = np.unique(batch.num_scheduled_tokens)
        if len(rows) > 1 or rows[0] == 1:
            return
        self.clear()
        step = StepTrees(
            self,
            batch.num_reqs,
            max_rows=int(rows[0]),
            only_trees=True,
            row_ends=batch.cu_num_logits,
            row_ends_np=batch.cu_num_logits_np,
            max_nodes=np.ones(batch.num_reqs, dtype=np.int64),
        )
        setattr(batch, _ATTRIBUTE, step)

    def clear(self) -> None:
        """A graph that is replayed without trees must not find the last step's."""
        if self._has_trees:
            self.num_rows.zero_()
            self._has_trees = False
