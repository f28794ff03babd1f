"""The trees of all requests, on the device.

Between steps a request is a slot of vLLM's; its tree and guesses are tensors indexed
by slot, which the host writes when a request arrives and never reads. During a step a
batch's trees lie in persistent buffers, so that CUDA graphs find them again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import vllm.utils.torch_utils as torch_utils
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_ppd.engine.v2.drafting import Drafter
from vllm_ppd.engine.v2.guessing import DraftMode
from vllm_ppd.engine.v2.lines import with_lines
from vllm_ppd.kernels.tree_attention import TreeBatch
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_walk import Walk
from vllm_ppd.kernels.triton.place_tree import place_tree
from vllm_ppd.trees.drafting import BigramTensors
from vllm_ppd.trees.layout import TreeTables, ranges
from vllm_ppd.trees.menu import TreePlan

# Far below any tree's id.
_NO_TREE = -(1 << 30)


class DeviceTrees:
    """Which tree every request runs, and where the trees of the step lie.

    Args:
        plan: the trees by load, evidence and state.
        vocab_size: the ids of prompt tokens' embeddings start here.
        num_drafts: K, rows besides the root that vLLM schedules at most.
        requests: vLLM's state of all requests.
        bigram: the bigram table, if there is one.
        weights: float32 [M] its weight at each prompt token; None without one.

    Attributes:
        served_plan: the trees.
        plan: the same with lines.
        tables: the same as tensors on the device.
        tree_states: int64 [S] the state that each tree is for.
        tree_classes: int64 [S] its match class; -1 for the bare root and for lines.
        matched: int32 [B] the match classes that were found for the next step; None
            if nobody looked.
        begun: told the match classes of requests that left slots and of those that
            came, with 1 for each; None if nobody wants to know.
        max_nodes: most nodes of any tree.
        row_bounds: rows per request for which the attention kernel is made, rising.
        walk: where this step's verification ended; None before it, and in steps in
            which no request has a tree.
        row_ends: int32 [B + 1] how many tree rows there are before each request.
    """

    def __init__(
        self,
        plan: TreePlan,
        vocab_size: int,
        num_drafts: int,
        requests: RequestState,
        bigram: BigramTensors | None = None,
        weights: torch.Tensor | None = None,
    ):
        device = requests.device
        self._requests = requests
        self._vocab_size, self._num_drafts = vocab_size, num_drafts
        self._successors, self._weights = bigram, weights
        # vLLM schedules the rows of the first plan's tiers, whatever plan follows.
        self.row_bounds = sorted(
            {num_drafts + 1}
            | {policy.max_rows for tier in plan.speculating for policy in tier.policies}
        )

        most = requests.max_num_reqs
        # By slot: the tree of the pending guesses, and the offset.
        self._tree_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(most, dtype=torch.int64, device=device)
        self._bare_roots = torch.zeros_like(self._tree_ids)
        # By batch order.
        self.trees = torch.zeros(most, dtype=torch.int64, device=device)
        self.num_rows, self.starts, self.context_lens = torch.zeros(
            3, most, dtype=torch.int32, device=device
        )
        self._depth = self._prompts = 0
        self.set_plan(plan)
        self._depth = self.tables.max_depth
        self._prompts = self.tables.num_prompt_tokens
        # By row of the step.
        tokens = requests.max_num_batched_tokens
        words = self.tables.ancestors.shape[2]
        self._ancestors = torch.zeros(tokens, words, dtype=torch.int64, device=device)
        self._depths = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._drafts = torch.zeros(most, num_drafts, dtype=torch.int64, device=device)
        self.matched: torch.Tensor | None = None
        self.begun: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None
        self.begun = None
        self.walk: Walk | None = None
        self.row_ends: torch.Tensor
        self._placed = False
        self._only_trees = False
        self._max_rows = 1

    def set_plan(self, plan: TreePlan) -> None:
        """Serve other trees; guesses that are pending are dropped.

        CUDA graphs do not mind: they read a step's trees from buffers that stay.

        Raises:
            ValueError: trees with more rows than vLLM schedules.
        """
        if plan.max_rows > self._num_drafts + 1:
            raise ValueError(
                f"the plan has trees of {plan.max_rows} rows, and the engine was built "
                f"for {self._num_drafts + 1} at most: restart it"
            )
        requests, device = self._requests, self._requests.device
        self.served_plan, self.plan = plan, with_lines(plan)
        host = TreeTables(self.plan, self._vocab_size, num_rows=self._num_drafts + 1)
        tables = DeviceTables.on(device, host)
        # Kernels are compiled by depth and width: smaller trees take those at hand.
        self.tables = replace(
            tables,
            max_depth=max(tables.max_depth, self._depth),
            num_prompt_tokens=max(tables.num_prompt_tokens, self._prompts),
        )
        self.guesser = Drafter(
            self.tables,
            host.max_children,
            self._vocab_size,
            plan.num_classes,
            requests,
            self._successors,
            self._weights,
        )
        self.max_nodes = int(host.num_nodes.max())
        self._num_states = plan.num_prompt_tokens + 1
        # Trees are numbered from a bare root on, state by state.
        ids = torch.arange(len(self.plan.trees), device=device)
        self.tree_states = ((ids - 1) % self._num_states).where(ids > 0, 0)
        classes = (ids - 1) // self._num_states % (plan.num_classes + 1)
        ordinary = (ids > 0) & (classes < plan.num_classes)
        self.tree_classes = classes.where(ordinary, -1)
        # What a request adds to the id of its load's first tree. Lines are the last
        # match class.
        self._offset_of = {
            DraftMode.TREES: 0,
            DraftMode.LINES: self._num_states * plan.num_classes,
            DraftMode.NOTHING: _NO_TREE,
        }
        self._tree_ids.zero_()

    def admit(self, slots: list[int], kinds: list[Guessing]) -> None:
        """New requests get a tree of state 0, guessed from their prompts alone.

        Their first step may come padded with guesses that nobody made (a request whose
        prompt is cached but for one token): it finds these.
        """
        index, offsets = torch_utils.async_tensor_h2d(
            [slots, [self._offset_of[kind] for kind in kinds]],
            device=self._requests.device,
            dtype=torch.int64,
        )
        self._offsets[index] = offsets
        drafts = torch.empty_like(self._drafts[: len(slots)])
        before = self.tree_classes[self._tree_ids[index]]
        self._grow(index, 1, None, None, drafts)
        if self.begun is not None and self.matched is not None:
            self.begun(before, self.matched, (offsets == 0).long())
        self._requests.draft_tokens[index] = drafts

    def grow(self, batch: InputBatch, logits: torch.Tensor | None) -> torch.Tensor:
        """The next step's trees, filled.

        Args:
            logits: float [B, M, V] of each prompt token of the end nodes; None where
                no request has any.

        Returns:
            int64 [B, K] draft ids, in a buffer that the next call overwrites.
        """
        states = None if self.walk is None else self.walk.num_prompted
        drafts = self._drafts[: batch.num_reqs]
        self._grow(batch.idx_mapping, batch.num_reqs, states, logits, drafts)
        return drafts

    def _grow(
        self,
        slots: torch.Tensor,  # int64 [B]
        running: int,
        states: torch.Tensor | None,  # int [B]; None: all 0
        logits: torch.Tensor | None,
        drafts: torch.Tensor,  # int64 [B, K]: written
    ) -> None:
        first = self.plan.first_trees[self.plan.tier_index(running)]
        self.matched = None
        if not first:
            # The bare root: what vLLM schedules all the same are fillers. A number
            # in the place of this tensor would make the host wait for the device.
            self._tree_ids[slots] = self._bare_roots[: len(slots)]
            drafts.zero_()
            return
        evidence = self.guesser.match(slots)
        self.matched = evidence.classes
        offsets = self._offsets[slots]
        trees = torch.where(
            offsets == 0, evidence.classes * self._num_states, offsets
        ).add_(first)
        if states is not None:
            trees += states
        trees.clamp_(min=0)
        self._tree_ids[slots] = trees
        self.guesser.fill(trees, evidence, states, logits, drafts)

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
        # Few different bounds, so that few variants of the attention kernel exist.
        most = int(np.diff(batch.cu_num_logits_np).max())
        self._max_rows = self.row_bounds[bisect_left(self.row_bounds, most)]
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

    def num_candidates(self, requests: int) -> torch.Tensor:
        """int32 [B] scheduled candidates of this step's trees."""
        nodes = self.tables.num_nodes[self.trees[:requests]]
        return torch.minimum(nodes, self.num_rows[:requests]) - 1

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

    def no_drafts(self, requests: int) -> torch.Tensor:
        """What `grow` returns, for runs that decode nothing."""
        return self._drafts[:requests]


# The trees for which attention metadata are being built: vLLM calls the builders with
# no room for another argument, and builds for one step at a time per process.
current: DeviceTrees | None = None
