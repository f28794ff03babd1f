"""DraftInputs for the next step: the prompt rows of the nodes where walks ended."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_ppd.engine.v2.request_trees import DeviceTrees
from vllm_ppd.search.plan_choice import PlanSettings
from vllm_ppd.trees.bigram_learning import OnlineBigram
from vllm_ppd.trees.drafting import BigramTensors
from vllm_ppd.trees.menu import TreePlan

# Where the front end puts PPD's settings in vLLM's additional_config.
KEY = "ppd"


class PPDSpeculator(BaseSpeculator):
    """Has no model and no KV: the guesses are outputs of the target's own step.

    vLLM keeps the drafts, [slots, K], in its request states and feeds them after the
    root of the next step; row layout and ids are those of the request's tree.
    """

    supports_mm_inputs = False
    draft_logits = None
    # The target, set once vLLM has loaded it.
    model: Any = None
    # The bigram table and its counts; None if it does not learn.
    online_bigram: OnlineBigram | None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, requests: RequestState
    ):
        speculative: Any = vllm_config.speculative_config
        given = vllm_config.additional_config[KEY]
        vocab_size = vllm_config.model_config.get_vocab_size()
        learns = given["learn_bigrams"]
        table = PlanSettings(**given["plan"]).bigram(vocab_size, learns)
        self.online_bigram, bigram, weights = None, None, None
        if table is not None:
            weights = torch.tensor(table.weights, device=device)
            if learns:
                self.online_bigram = OnlineBigram.of(table, device)
                bigram = self.online_bigram.table
            else:
                bigram = BigramTensors.of(table, device)
        self.trees = DeviceTrees(
            TreePlan.from_dict(speculative.plan),
            vocab_size,
            requests.num_speculative_steps,
            requests,
            bigram,
            weights,
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
        logits = None
        if trees.walk is not None and tables.num_prompt_tokens:
            rows = trees.walk.prompt_rows.flatten()
            logits = self.model.compute_logits(last_hidden_states[rows])
            logits = logits.view(requests, tables.num_prompt_tokens, tables.num_ept, -1)
            # The EPTs of a prompt token vote by mean.
            logits = logits.mean(2) if tables.num_ept > 1 else logits[:, :, 0]
        return trees.grow(input_batch, logits)

    def _use_as_much_memory_as_a_step(
        self, requests: int, hidden: torch.Tensor
    ) -> None:
        """vLLM's memory profile runs one row of logits per request; a step has more."""
        tables = self.trees.tables
        prompts = tables.num_prompt_tokens * tables.num_ept
        for rows in (requests * self.trees.max_nodes, requests * prompts):
            index = torch.arange(max(1, rows), device=hidden.device) % len(hidden)
            self.model.compute_logits(hidden[index])
