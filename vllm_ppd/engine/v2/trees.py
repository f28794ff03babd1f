"""The trees of all requests, on the device.

Between steps a request is a slot of vLLM's; its tree and guesses are tensors indexed
by slot, which the host writes when a request arrives and never reads. During a step a
batch's trees lie in persistent buffers, so that CUDA graphs find them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import vllm.utils.torch_utils as torch_utils
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_ppd.engine.v2.guessing import Guessing
from vllm_ppd.engine.v2.lines import with_lines
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.tree_tables import TreeTables
from vllm_ppd.kernels.tree_walk import Walk
from vllm_ppd.kernels.triton.fill_tree import fill_tree
from vllm_ppd.kernels.triton.place_tree import place_tree
from vllm_ppd.plan import TreePlan
from vllm_ppd.step import ranges
from vllm_ppd.tables import PolicyTables

# Far below any tree's id.
_NO_TREE = -(1 << 30)


class DeviceTrees:
    """Which tree every request runs, and where the trees of the step lie.

    Args:
        plan: the trees by load and state.
        first_soft_id: id of the first prompt token's embedding.
        num_drafts: K, rows besides the root that vLLM schedules at most.
        requests: vLLM's state of all requests.

    Attributes:
        tables: the trees as tensors on the device.
        walk: where this step's verification ended; None before it, and in steps in
            which no request has a tree.
        row_ends: int32 [B + 1] how many tree rows there are before each request.
    """

    def __init__(
        self,
        plan: TreePlan,
        first_soft_id: int,
        num_drafts: int,
        requests: RequestState,
    ):
        device = requests.device
        self._requests = requests
        self._plan = with_lines(plan)
        host = PolicyTables(self._plan, first_soft_id, num_rows=num_drafts + 1)
        self.tables = tables = TreeTables.on(device, host)
        self.max_nodes = int(host.num_nodes.max())
        self.max_candidates = host.max_candidates
        # A tier's lines come right after its trees, state by state.
        self._line_offset = plan.num_prompt_tokens + 1

        most = requests.max_num_reqs
        # By slot: the tree of the pending guesses, and what a request adds to the id
        # of a tier's first tree: 0, the way to its lines, or far less for no tree.
        self._tree_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(most, dtype=torch.int64, device=device)
        # By batch order.
        self.trees = torch.zeros(most, dtype=torch.int64, device=device)
        self.num_rows, self.starts, self.context_lens = torch.zeros(
            3, most, dtype=torch.int32, device=device
        )
        # By row of the step.
        tokens, words = requests.max_num_batched_tokens, tables.ancestors.shape[2]
        self._ancestors = torch.zeros(tokens, words, dtype=torch.int64, device=device)
        self._depths = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._drafts = torch.zeros(most, num_drafts, dtype=torch.int64, device=device)
        self.walk: Walk | None = None
        self.row_ends: torch.Tensor
        self._placed = False
        self._only_trees = False
        self._max_rows = 1

    def admit(self, slots: list[int], kinds: list[Guessing]) -> None:
        """New requests: state 0, the root and its prompt tokens.

        Their first step may come padded with guesses that nobody made (a request whose
        prompt is cached but for one token): it finds state 0's tree in them.
        """
        offset_of = {
            Guessing.TREES: 0,
            Guessing.LINES: self._line_offset,
            Guessing.NOTHING: _NO_TREE,
        }
        index, offsets = torch_utils.async_tensor_h2d(
            [slots, [offset_of[kind] for kind in kinds]],
            device=self._requests.device,
            dtype=torch.int64,
        )
        self._offsets[index] = offsets
        trees = self._first_trees(offsets, running=1)
        drafts = torch.empty_like(self._drafts[: len(slots)])
        fill_tree(self.tables, trees, self._nothing(len(slots)), drafts)
        self._tree_ids[index] = trees
        self._requests.draft_tokens[index] = drafts

    def _first_trees(self, offsets: torch.Tensor, running: int) -> torch.Tensor:
        """[B] the state-0 tree of requests at this load; 0, the bare root, for none."""
        first = self._plan.first_trees[self._plan.tier_index(running)]
        if not first:
            return torch.zeros_like(offsets)
        return (offsets + first).clamp_(min=0)

    def place(self, batch: InputBatch) -> None:
        """Lay the batch's trees out: positions, masks, and where each tree lies."""
        self.walk = None
        self._placed = batch.num_draft_tokens > 0
        if not self._placed:
            return
        self.row_ends = batch.cu_num_logits
        requests = batch.num_reqs
        starts = batch.cu_num_logits
        trees, rows = self.trees[:requests], self.num_rows[:requests]
        torch.index_select(self._tree_ids, 0, batch.idx_mapping, out=trees)
        torch.sub(starts[1:], starts[:-1], out=rows)
        self.num_rows[requests:] = 0
        self._only_trees = int(batch.cu_num_logits_np[-1]) == batch.num_tokens
        self._max_rows = int(np.diff(batch.cu_num_logits_np).max())
        # A request without guesses is a tree cut down to its root.
        place_tree(
            self.tables,
            trees,
            rows,
            batch.query_start_loc[: requests + 1],
            batch.seq_lens[:requests],
            batch.positions,
            self._ancestors[: batch.num_tokens],
            self._depths[: batch.num_tokens],
            self.starts[:requests],
            self.context_lens[:requests],
        )

    @contextmanager
    def published(self, capture_rows: int = 0) -> Iterator[None]:
        """Let the attention layers' metadata be built with this step's trees.

        Args:
            capture_rows: a CUDA graph is being captured for this many rows of every
                request; it will find the trees in the buffers when it is replayed.
        """
        global current
        if capture_rows > 1:
            self.num_rows.zero_()
            self._max_rows = capture_rows
            self._placed = self._only_trees = True
        elif not self._placed:
            # A graph that is replayed without trees must not find the last step's.
            self.num_rows.zero_()
        current = self if self._placed else None
        try:
            yield
        finally:
            current = None
            self._placed = False

    def batch(self, block_table: torch.Tensor) -> tuple[TreeBatch, bool]:
        """What tree attention needs, and whether there are no rows but trees'."""
        requests = len(block_table)
        batch = TreeBatch(
            block_table=block_table,
            starts=self.starts[:requests],
            num_rows=self.num_rows[:requests],
            context_lens=self.context_lens[:requests],
            ancestors=self._ancestors,
            depths=self._depths,
            max_rows=self._max_rows,
        )
        return batch, self._only_trees

    def with_node_logits(self, batch: InputBatch) -> InputBatch:
        """The batch with logits for nodes only: prompt rows need theirs later, at one
        node each.

        How many nodes a request has is known on the device alone, so each gets as
        many rows as the largest tree has nodes.
        """
        counts = np.diff(batch.cu_num_logits_np)
        kept = np.minimum(counts, self.max_nodes)
        if (kept == counts).all():
            return batch
        ends = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
        sources = ranges(batch.cu_num_logits_np[:-1], kept).astype(np.int32)
        both = torch_utils.async_tensor_h2d(
            np.concatenate([ends, sources]), device=batch.cu_num_logits.device
        )
        index = both[len(ends) :]
        return replace(
            batch,
            cu_num_logits=both[: len(ends)],
            cu_num_logits_np=ends,
            logits_indices=batch.logits_indices[index],
            expanded_idx_mapping=batch.expanded_idx_mapping[index],
            expanded_local_pos=batch.expanded_local_pos[index],
        )

    def grow(self, batch: InputBatch, best: torch.Tensor | None) -> torch.Tensor:
        """The next step's trees, filled.

        Args:
            best: int [B, M, k] best tokens after each prompt token of the end nodes,
                best first; None where no request has any.

        Returns:
            int64 [B, K] draft ids, in a buffer that the next call overwrites.
        """
        requests = batch.num_reqs
        trees = self._first_trees(self._offsets[batch.idx_mapping], requests)
        if best is None or self.walk is None:
            best = self._nothing(requests)
        else:
            trees = torch.where(trees > 0, trees + self.walk.states, trees)
        self._tree_ids[batch.idx_mapping] = trees
        drafts = self._drafts[:requests]
        fill_tree(self.tables, trees, best, drafts)
        return drafts

    def no_drafts(self, requests: int) -> torch.Tensor:
        """What `grow` returns, for runs that decode nothing."""
        return self._drafts[:requests]

    def _nothing(self, requests: int) -> torch.Tensor:
        """[B, M, k] tokens that no tree of state 0 looks at."""
        shape = requests, self.tables.num_prompt_tokens, self.max_candidates
        return self._drafts.new_zeros(shape)


# The trees for which attention metadata are being built: vLLM calls the builders with
# no room for another argument, and builds for one step at a time per process.
current: DeviceTrees | None = None
