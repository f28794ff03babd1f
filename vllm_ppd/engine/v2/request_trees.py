"""The trees of requests between steps: one tree id and one draft mode per slot.

A request is a slot of vLLM's RequestState. Tensors are indexed by slot; the host
writes them when a request arrives and never reads them.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
import torch
import vllm.utils.torch_utils as torch_utils

from vllm_ppd.engine.refusals import opts_out
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS
from vllm_ppd.trees.tree import TreePolicy, chain_tree

# Far below any tree's id.
_NO_TREE = -(1 << 30)


class DraftMode(Enum):
    """How a request is drafted for."""

    TREE = "tree"
    CHAIN = "chain"
    """Trees without siblings: the request's logits depend on its own history. vLLM's
    penalties, bad words, thinking budgets, grammars and custom logits processors take
    the rows before a row for its history. In a chain they are: draft token ``d`` is row
    ``d``, and all prompt rows come after."""
    NONE = "none"
    """Rows are scheduled as for other requests, and all but the root are padding."""

    @classmethod
    def of(cls, params: Any, needs_history: bool = False) -> DraftMode:
        """What vLLM's SamplingParams ask for, or need; None for a pooling request.

        needs_history: whatever they ask for.
        """
        if params is None or opts_out(params.extra_args):
            return cls.NONE
        needs_history = (
            needs_history
            or params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
            or bool(params.bad_words)
            or params.structured_outputs is not None
            or getattr(params, "thinking_token_budget", None) is not None
        )
        return cls.CHAIN if needs_history else cls.TREE


class RequestTrees:
    """Which tree the pending drafts of each request are for.

    Args:
        menu: the trees to serve.
        vocab_size: the ids of prompt tokens' embeddings start here.
        num_drafts: K, rows besides the root that vLLM schedules at most.
        max_num_reqs: slots.
        device: of all tensors.

    Attributes:
        menu: the same with chains.
        tables: the same as tensors.
        max_children: most children of any node, plus what their ranks skip.
        num_prompted: int64 [S] the num_prompted that each tree is for.
        row_bounds: rows per request for which attention kernels are made, rising.
        max_nodes: int64 [slots], on the host: most nodes of a slot's tree.
    """

    def __init__(
        self,
        menu: TreeMenu,
        vocab_size: int,
        num_drafts: int,
        max_num_reqs: int,
        device: torch.device,
    ):
        self.menu = with_chains(menu)
        host = TreeTables(self.menu, vocab_size, num_rows=num_drafts + 1)
        self.tables = DeviceTables.on(device, host)
        self.max_children = host.max_children
        lengths = {entry.num_draft_tokens for entry in menu.entries} | {num_drafts}
        self.row_bounds = sorted(length + 1 for length in lengths)

        # Trees are numbered from the root-only one on, by num_prompted.
        self._per_class = menu.num_prompt_tokens + 1
        ids = torch.arange(len(self.menu.trees), device=device)
        self.num_prompted = ((ids - 1) % self._per_class).where(ids > 0, 0)
        ends = [*self.menu.first_trees[1:], len(self.menu.trees)]
        self._entry_nodes = [
            int(host.num_nodes[first:end].max())
            for first, end in zip(self.menu.first_trees, ends, strict=True)
        ]
        self.max_nodes = np.ones(max_num_reqs, dtype=np.int64)
        # What a request adds to the id of its entry's first tree instead of its n-gram
        # match class's. Chains are the last class.
        self._offset_of = {
            DraftMode.TREE: 0,
            DraftMode.CHAIN: self._per_class * menu.num_classes,
            DraftMode.NONE: _NO_TREE,
        }
        self._ids = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._offsets = torch.zeros_like(self._ids)
        self._root_only = torch.zeros_like(self._ids)

    @property
    def most_nodes(self) -> int:
        """Nodes of the largest tree."""
        return max(self._entry_nodes)

    def admit(self, slots: list[int], modes: list[DraftMode]) -> None:
        """New requests have the root-only tree until their prompt is read.

        A row that vLLM schedules for one of them besides its root is padding then.
        """
        index, offsets = torch_utils.async_tensor_h2d(
            [slots, [self._offset_of[mode] for mode in modes]],
            device=self._ids.device,
            dtype=torch.int64,
        )
        self._offsets[index] = offsets
        # A number in the place of this tensor would make the host wait for the device.
        self._ids[index] = self._root_only[: len(slots)]
        self.max_nodes[slots] = 1

    def grow(
        self,
        entry: int,
        slots: torch.Tensor,  # int64 [B]
        slots_np: np.ndarray,  # the same on the host
        match_classes: torch.Tensor,  # int [B]: n-gram match class
        num_prompted: torch.Tensor | None,  # int [B]; None: all 0
    ) -> torch.Tensor:
        """Choose the next step's trees from one menu entry; returns int64 [B] ids.

        A request that the next step leaves out keeps its tree, and its drafts.
        """
        offsets = self._offsets[slots]
        ids = torch.where(offsets == 0, match_classes * self._per_class, offsets)
        ids += self.menu.first_trees[entry]
        if num_prompted is not None:
            ids += num_prompted
        ids.clamp_(min=0)
        self._ids[slots] = ids
        self.max_nodes[slots_np] = self._entry_nodes[entry]
        return ids

    def put(self, slot: int, tree_id: int) -> None:
        """Give a request a tree that its drafts have been made for elsewhere."""
        self._ids[slot] = tree_id
        self.max_nodes[slot] = self.menu.trees[tree_id].num_nodes

    def copy_ids(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        """Write the tree ids of slots, int64 [B], to `out`."""
        torch.index_select(self._ids, 0, slots, out=out)


def with_chains(menu: TreeMenu) -> TreeMenu:
    """The menu with one more match class in each entry: chains."""
    return TreeMenu(
        tuple(
            replace(entry, policies=(*entry.policies, _chain_policy(entry)))
            for entry in menu.entries
        )
    )


def _chain_policy(entry: MenuEntry) -> TreePolicy:
    """For each num_prompted a chain in the place of the entry's tree.

    It has at most the rows of the entry's largest tree, at most as many draft tokens
    as prompt rows reach, and as many prompt tokens as fit, the first ones of every
    node first, so that the next step has prompt rows wherever this one ends. Without
    prompt tokens it has as many draft tokens as an n-gram draft.
    """
    first = entry.policies[0]
    m, num_ept = first.num_prompt_tokens, first.num_ept
    trees = []
    for num_prompted in range(m + 1):
        # One prompt token per node at least, or the draft after it would be the last.
        length = max(0, min(num_prompted, entry.max_rows // (1 + num_ept) - 1))
        if not m:
            length = min(MAX_NGRAM_DRAFTS, entry.num_draft_tokens)
        nodes = length + 1
        tokens = min((entry.max_rows - nodes) // num_ept, nodes * m)
        each, more = divmod(tokens, nodes)
        prompts = [each + (node < more) for node in range(nodes)]
        trees.append(chain_tree(length, prompts, num_ept))
    return TreePolicy(tuple(trees))
