"""PPD in vLLM's V1 model runner, on CPU: only what V1 does differently.

Trees and acceptance live in the pure core; this mixin says where V1's step hands over.
In the order of a step:

``_update_states``              forget finished requests, note who opts out
``_prepare_inputs``             lay out the trees, move positions, publish the masks
``_calc_spec_decode_metadata``  logits for nodes only, not for prompt rows
``_determine_batch_...``        few different numbers of rows
``_sample``                     walk the trees with vLLM's own sampler; move KV
``propose_draft_token_ids``     draft from the prompt rows where the walks ended

The scheduler says with each step how many draft rows the next one may have; it names an
entry of the tree menu. If that is 0 and the step has no drafts, the step runs vLLM's
own code: its runner speculates if it has a ``speculative_config``, which is None then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import vllm.v1.worker.gpu_model_runner as gpu_model_runner
from vllm.config import SpeculativeConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ppd.engine.attention import require_tree_attention, set_current_step
from vllm_ppd.engine.counters import StepCounts, counts_of
from vllm_ppd.engine.patches import replaced
from vllm_ppd.engine.refusals import opts_out
from vllm_ppd.engine.v1.bigram_learner import BigramLearner
from vllm_ppd.engine.v1.kv_move import KVMover
from vllm_ppd.engine.v1.sampling import logitsprocs_without_drafts, walk_trees
from vllm_ppd.engine.v1.served_trees import PPDProposer
from vllm_ppd.engine.v1.step_trees import StepTrees
from vllm_ppd.kernels.cpu.tree_walk import match_ngrams_cpu
from vllm_ppd.trees.drafting import DraftInputs
from vllm_ppd.trees.layout import TreeStep, ranges
from vllm_ppd.trees.menu import TreeMenu
from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS
from vllm_ppd.trees.verify import TreeWalk

# Methods of vLLM's runner that the mixin overrides; their contract is tested.
OVERRIDDEN = (
    "initialize_kv_cache",
    "_update_states",
    "_prepare_inputs",
    "_calc_spec_decode_metadata",
    "_determine_batch_execution_and_padding",
    "_input_fits_in_drafter",
    "_sample",
    "propose_draft_token_ids",
)

# Tokens of a request's context in which an n-gram match is looked up.
_NGRAM_CONTEXT = 4096
_NO_NGRAMS = np.full((1, MAX_NGRAM_DRAFTS), -1)


def _padding(rows: int) -> int:
    """How many rows to add to so many, so that steps have few sizes.

    vLLM's matrix products keep code for 32 sizes of each layer and 1024 in all, and
    making it anew takes milliseconds.
    """
    return 0 if rows <= 32 else -rows % 8


class PPDRunnerMixin:
    """Goes before a V1 ``GPUModelRunner`` in the bases of a model runner."""

    drafter: PPDProposer
    speculative_config: SpeculativeConfig | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A function that vLLM calls by its module's name for it; no method to override.
        make = logitsprocs_without_drafts
        with replaced(gpu_model_runner, "build_logitsprocs", make):
            super().__init__(*args, **kwargs)
        # What vLLM's runner has as its own attribute, while a step speculates.
        self._ppd_speculative = self.speculative_config
        # The tree that each request's pending drafts were made for.
        self.ppd_trees: dict[str, int] = {}
        self.ppd_opted_out: set[str] = set()
        # The trees of this step and where their walks went; None in a plain step.
        self._ppd_step: TreeStep | None = None
        self._ppd_walk: TreeWalk | None = None
        # Tree id of match class 0, num_prompted 0 for the next step; 0 for a plain one.
        self._ppd_first_tree = 0
        # Whether prompt rows have logits in this step too, and then where nodes' are.
        self._ppd_all_logits = False
        self._ppd_logit_rows: np.ndarray | None = None
        self._ppd_learner: BigramLearner | None = None
        # Steps before requests are served count for nothing.
        self.ppd_log = StepCounts(self.drafter.menu.num_prompt_tokens + 1)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        require_tree_attention(self)
        batch: Any = self.input_batch  # type: ignore[attr-defined]
        holder = batch.thinking_budget_state_holder
        if holder is not None:
            # It would expect a row of logits for every draft token.
            holder.in_spec_mode = False
        self.ppd_mover = KVMover(self)

    def ppd_processors(self) -> tuple[Any, str, Any]:
        """Where the logits processors are, and what stands for none."""
        batch: Any = self.input_batch  # type: ignore[attr-defined]
        return batch, "logitsprocs", LogitsProcessors()

    @property
    def ppd_menu(self) -> TreeMenu:
        """The trees that are served."""
        return self.drafter.menu

    def ppd_pend(self, request_id: str, tree_id: int, drafts: list[int]) -> None:
        """Have a request's next step run this tree; its drafts come with the step."""
        self.ppd_trees[request_id] = tree_id

    def start_serving(self) -> None:
        """Count and learn from now on; what ran before was no traffic."""
        first_rank = get_tensor_model_parallel_rank() == 0
        num_prompted = self.drafter.menu.num_prompt_tokens + 1
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        self.ppd_log = counts_of(config, num_prompted, publish=first_rank)
        if self.drafter.online_bigram is not None:
            self._ppd_learner = BigramLearner(self.drafter.online_bigram)

    def _update_states(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.ppd_trees.pop(request_id, None)
            self.ppd_opted_out.discard(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if params is not None and opts_out(params.extra_args):
                self.ppd_opted_out.add(request.req_id)
        first_tree = self.drafter.menu.first_tree(
            scheduler_output.num_spec_tokens_to_schedule
        )
        running = scheduler_output.num_scheduled_tokens
        if self.ppd_opted_out and self.ppd_opted_out.issuperset(running):
            first_tree = 0
        self._ppd_first_tree = first_tree
        speculates = first_tree or scheduler_output.scheduled_spec_decode_tokens
        self.speculative_config = self._ppd_speculative if speculates else None
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _prepare_inputs(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray
    ) -> Any:
        self._ppd_step = self._ppd_walk = None
        set_current_step(None)
        if not scheduler_output.scheduled_spec_decode_tokens:
            return super()._prepare_inputs(  # type: ignore[misc]
                scheduler_output, num_scheduled_tokens
            )
        step, contexts = self._lay_out(scheduler_output, num_scheduled_tokens)
        self._ppd_step = step
        self._ppd_all_logits = scheduler_output.has_structured_output_requests
        prepared = super()._prepare_inputs(  # type: ignore[misc]
            scheduler_output, num_scheduled_tokens
        )
        total_rows = scheduler_output.total_num_scheduled_tokens
        positions: Any = self.positions  # type: ignore[attr-defined]
        set_current_step(StepTrees.place(step, contexts, total_rows, positions))
        return prepared

    def _lay_out(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray
    ) -> tuple[TreeStep, np.ndarray]:
        """The step's trees, and [B] KV entries before each request's root."""
        drafts_of = scheduler_output.scheduled_spec_decode_tokens
        inputs = self.input_batch  # type: ignore[attr-defined]
        batch = len(inputs.req_ids)
        tree_ids = np.zeros(batch, dtype=np.int64)
        num_rows = np.ones(batch, dtype=np.int64)
        for index, request_id in enumerate(inputs.req_ids):
            drafts = drafts_of.get(request_id)
            if drafts:
                num_rows[index] += len(drafts)
                # Rows that vLLM padded with -1 are no draft of ours: the root-only
                # tree serves them.
                if drafts[0] >= 0:
                    tree_ids[index] = self.ppd_trees[request_id]
        ends = np.cumsum(num_scheduled_tokens, dtype=np.int64)
        computed = inputs.num_computed_tokens_cpu[:batch]
        contexts = computed + num_scheduled_tokens - num_rows
        step = TreeStep(self.drafter.tables, tree_ids, ends - num_rows, num_rows)
        if (num_rows == num_scheduled_tokens).all():
            # No request reads a prompt: a plain decode is a tree of one row, and the
            # stock attention kernel has nothing to do.
            step.tree_requests = np.arange(batch)
        return step, contexts

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
        """Logits of nodes only: prompt rows need theirs only where a walk ends."""
        step = self._ppd_step
        self._ppd_logit_rows = None
        if step is None:
            rows = cu_num_scheduled_tokens[: len(num_draft_tokens)] - 1
        elif self._ppd_all_logits:
            # vLLM's grammar masks expect logits for every scheduled draft.
            rows = ranges(step.starts, step.num_rows)
            firsts = np.cumsum(step.num_rows) - step.num_rows
            self._ppd_logit_rows = ranges(firsts, step.num_nodes)
        else:
            rows = step.node_rows
            rows = np.pad(rows, (0, _padding(len(rows))), mode="edge")
        # Only logits_indices is read: verification and drafting are ours.
        empty = torch.empty(0, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=empty,
            num_draft_tokens=[0],
            cu_num_draft_tokens=empty,
            cu_num_sampled_tokens=empty,
            target_logits_indices=empty,
            bonus_logits_indices=empty,
            logits_indices=torch.from_numpy(rows),
        )

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        mode, batch, *others = super()._determine_batch_execution_and_padding(  # type: ignore
            *args, **kwargs
        )
        if self._ppd_step is not None:
            rows = batch.num_tokens + _padding(batch.num_tokens)
            most: int = self.max_num_tokens  # type: ignore[attr-defined]
            batch = replace(batch, num_tokens=min(rows, most))
        return mode, batch, *others

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # The scheduler cuts trees at the model's length; nothing else can overflow.
        return True

    def _sample(
        self, logits: torch.Tensor, spec_decode_metadata: SpecDecodeMetadata
    ) -> SamplerOutput:
        step = self._ppd_step
        if step is None:
            # A plain step: vLLM's own sampling, as if without speculation.
            output = super()._sample(logits, None)  # type: ignore[misc]
            batch = self.input_batch.num_reqs  # type: ignore[attr-defined]
            self.ppd_log.after_plain_step(batch)
            return output
        set_current_step(None)
        if self._ppd_logit_rows is not None:
            logits = logits[torch.from_numpy(self._ppd_logit_rows)]
        logits = logits[: len(step.node_rows)]
        tokens = self.input_ids.np[step.node_rows]  # type: ignore[attr-defined]
        walk, sources, targets, output = walk_trees(self, step, tokens, logits)
        self._ppd_walk = walk
        if sources.size:
            self.ppd_mover.move(sources, targets)
        if self._ppd_learner is not None:
            self._ppd_learner.after_walk(step, walk, tokens, logits)
        num_prompted = self.drafter.num_prompted_of[step.tree_ids]
        self.ppd_log.after_step(step, walk, num_prompted)
        return output

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        drafter, batch = self.drafter, len(sampled_token_ids)
        if not self._ppd_first_tree:
            return [[]] * batch
        tables, step = drafter.tables, self._ppd_step
        num_prompted = np.zeros(batch, dtype=np.int64)
        logits = drafter.no_logits
        if step is not None and self._ppd_walk is not None:
            rows, num_prompted = step.prompt_rows(self._ppd_walk.nodes)
            if rows.size:
                padded = np.pad(rows, (0, _padding(len(rows))), mode="edge")
                logits = self.model.compute_logits(  # type: ignore[attr-defined]
                    hidden_states[torch.from_numpy(padded)]
                )[: len(rows)].float()
                if tables.num_ept > 1:
                    logits = logits.unflatten(0, (-1, tables.num_ept)).mean(1)
        classes, ngrams = self._match_ngrams(batch)
        per_class = drafter.menu.num_prompt_tokens + 1
        tree_ids = self._ppd_first_tree + classes * per_class + num_prompted
        request_ids = self.input_batch.req_ids  # type: ignore[attr-defined]
        self.ppd_trees.update(zip(request_ids, tree_ids.tolist(), strict=True))
        lengths = tables.num_rows[tree_ids].tolist()
        if max(lengths) == 1:
            return [[]] * batch
        roots = np.array([tokens[-1] if tokens else 0 for tokens in sampled_token_ids])
        inputs = DraftInputs(num_prompted, logits, roots, ngrams)
        ids = drafter.fill(tree_ids, inputs).tolist()
        grammar = scheduler_output.has_structured_output_requests
        drafts = []
        for index, request_id in enumerate(request_ids):
            plain = (
                not sampled_token_ids[index]
                or request_id in self.ppd_opted_out
                or (grammar and self._has_grammar(request_id))
            )
            drafts.append([] if plain else ids[index][: lengths[index] - 1])
        return drafts

    def _match_ngrams(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """[B] match classes and [B, L] n-gram drafts, of the requests' own contexts."""
        if self.drafter.menu.num_classes == 1:
            return np.zeros(batch, dtype=np.int64), _NO_NGRAMS.repeat(batch, axis=0)
        inputs = self.input_batch  # type: ignore[attr-defined]
        ends, token_ids = inputs.num_tokens_no_spec[:batch], inputs.token_ids_cpu
        return match_ngrams_cpu(token_ids, ends, _NGRAM_CONTEXT)

    def _has_grammar(self, request_id: str) -> bool:
        # A grammar is checked along one chain of tokens; a tree's siblings are none.
        params = self.requests[request_id].sampling_params  # type: ignore
        return params is not None and params.structured_outputs is not None


class PPDCPUModelRunner(PPDRunnerMixin, CPUModelRunner):
    """The V1 model runner on a CPU, speculating with prompt tokens."""
