"""Guesses for the next step: the prompt rows of the nodes where walks ended."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_ppd.engine.v2.trees import DeviceTrees
from vllm_ppd.plan import TreePlan


class PPDSpeculator(BaseSpeculator):
    """Has no model and no KV: the guesses are outputs of the target's own step.

    vLLM keeps the drafts, [slots, K], in its request states and feeds them after the
    root of the next step; row layout and ids are those of the request's tree.
    """

    supports_mm_inputs = False
    draft_logits = None
    # The target, set once vLLM has loaded it.
    model: Any = None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, requests: RequestState
    ):
        self.trees = DeviceTrees(
            TreePlan.from_dict(vllm_config.speculative_config.plan),  # type: ignore
            first_soft_id=vllm_config.model_config.get_vocab_size(),
            num_drafts=requests.num_speculative_steps,
            requests=requests,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of ours is captured; the target's graphs hold the trees."""

    def capture(self) -> None:
        """See init_cudagraph_manager."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,  # [rows of the step, hidden]
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """int64 [B, K] draft ids."""
        trees, tables = self.trees, self.trees.tables
        requests = input_batch.num_reqs
        if dummy_run:
            if is_profile:
                self._use_as_much_memory_as_a_step(requests, last_hidden_states)
            return trees.no_drafts(requests)
        best = None
        if trees.walk is not None:
            rows = trees.walk.prompt_rows.flatten()
            best = self._best(last_hidden_states[rows])
            best = best.view(requests, tables.num_prompt_tokens, -1)
        return trees.grow(input_batch, best)

    def _best(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows / EPTs, k] best tokens; the EPTs of a prompt token vote by mean."""
        logits = self.model.compute_logits(hidden)
        ept = self.trees.tables.num_ept
        if ept > 1:
            logits = logits.unflatten(0, (-1, ept)).mean(1)
        return logits.topk(self.trees.max_candidates).indices

    def _use_as_much_memory_as_a_step(
        self, requests: int, hidden: torch.Tensor
    ) -> None:
        """vLLM's memory profile runs one row of logits per request; a step has more."""
        tables = self.trees.tables
        prompts = tables.num_prompt_tokens * tables.num_ept
        for rows in (requests * self.trees.max_nodes, requests * prompts):
            index = torch.arange(max(1, rows), device=hidden.device) % len(hidden)
            self.model.compute_logits(hidden[index])
