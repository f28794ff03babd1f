"""PPD in vLLM's V1 model runner, on CPU and GPU: only what V1 does differently.

Trees, states and acceptance live in the pure core; this mixin says where V1's step
hands over. In the order of a step:

``_update_states``            forget finished requests, note who opts out
``_prepare_inputs``           lay out the trees, move positions, publish the masks
``_calc_spec_decode_metadata``  logits for nodes only, not for prompt rows
``_sample``                   walk the trees with vLLM's own sampler; move KV
``propose_draft_token_ids``   guesses from the prompt rows where the walks ended

Where nobody guesses and nobody shall, a step is vLLM's own: its runner speculates if it
has a ``speculative_config``, which is None for that step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_ppd.engine.counters import counts_of
from vllm_ppd.engine.opt_out import opts_out
from vllm_ppd.engine.v1 import step_context
from vllm_ppd.engine.v1.kv_move import KVMover
from vllm_ppd.engine.v1.online import OnlineTrees
from vllm_ppd.engine.v1.sampling import walk_trees
from vllm_ppd.engine.v1.served_trees import PPDProposer
from vllm_ppd.engine.v1.step_log import StepLog
from vllm_ppd.engine.v1.table_learner import TableLearner
from vllm_ppd.engine.v1.tree_rows import lay_out_trees, place_trees
from vllm_ppd.kernels.cpu import match_ngrams_cpu
from vllm_ppd.trees.drafting import DraftInputs
from vllm_ppd.trees.menu import TreePlan
from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS
from vllm_ppd.trees.step import TreeStep, ranges
from vllm_ppd.trees.verify import TreeWalk

# Methods of vLLM's runner that the mixin overrides; their contract is tested.
OVERRIDDEN = (
    "initialize_kv_cache",
    "_update_states",
    "_prepare_inputs",
    "_calc_spec_decode_metadata",
    "_input_fits_in_drafter",
    "_sample",
    "propose_draft_token_ids",
)

# Tokens of a request's context in which an earlier match is looked for.
_MATCHED = 4096
_NO_CHAINS = np.full((1, MAX_NGRAM_DRAFTS), -1)


class PPDRunnerMixin:
    """Goes before a V1 ``GPUModelRunner`` in the bases of a model runner."""

    drafter: PPDProposer
    speculative_config: SpeculativeConfig | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What vLLM's runner has as its own attribute, while a step speculates.
        self._ppd_speculative = self.speculative_config
        # The tree that each request's pending guesses were laid out for.
        self.ppd_trees: dict[str, int] = {}
        self.ppd_opted_out: set[str] = set()
        # The trees of this step and where their walks went; None in a plain step.
        self._ppd_step: TreeStep | None = None
        self._ppd_walk: TreeWalk | None = None
        # Rows and new requests of this step.
        self._ppd_rows = self._ppd_new = 0
        # Whether prompt rows have logits in this step too, and then where nodes' are.
        self._ppd_all_logits = False
        self._ppd_logit_rows: np.ndarray | None = None
        self._ppd_online: OnlineTrees | None = None
        self._ppd_table: TableLearner | None = None
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        first = get_tensor_model_parallel_rank() == 0
        counts = counts_of(config, self.drafter.num_states, publish=first)
        self._ppd_log = StepLog(counts)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self._ppd_mover = KVMover(self)

    def start_learning(self) -> None:
        """Follow the traffic from now on; what ran before was no traffic."""
        if self.drafter.online_bigram is not None:
            self._ppd_table = TableLearner(self.drafter.online_bigram)
        if self.drafter.online:
            config = self.vllm_config.parallel_config  # type: ignore[attr-defined]
            ranks = config.tensor_parallel_size
            self._ppd_online = OnlineTrees(self.drafter, ranks)

    def _update_states(self, scheduler_output: Any) -> Any:
        self._ppd_rows = scheduler_output.total_num_scheduled_tokens
        self._ppd_new = len(scheduler_output.scheduled_new_reqs)
        for request_id in scheduler_output.finished_req_ids:
            self.ppd_trees.pop(request_id, None)
            self.ppd_opted_out.discard(request_id)
            if self._ppd_online is not None:
                self._ppd_online.forget_request(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if params is not None and opts_out(params.extra_args):
                self.ppd_opted_out.add(request.req_id)
        speculates = self._speculates(scheduler_output)
        self.speculative_config = self._ppd_speculative if speculates else None
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _speculates(self, scheduler_output: Any) -> bool:
        """Whether the step has guesses, or may be followed by one that has."""
        if scheduler_output.scheduled_spec_decode_tokens:
            return True
        request_ids, online = scheduler_output.num_scheduled_tokens, self._ppd_online
        running = len(request_ids)
        if not self.drafter.first_tree(running) or self._all_opted_out(request_ids):
            return False
        return online is None or online.guesses(running)

    def _prepare_inputs(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray
    ) -> Any:
        self._ppd_step = self._ppd_walk = None
        if not scheduler_output.scheduled_spec_decode_tokens:
            step_context.set_current(None)
            return super()._prepare_inputs(  # type: ignore[misc]
                scheduler_output, num_scheduled_tokens
            )
        laid_out = lay_out_trees(self, scheduler_output, num_scheduled_tokens)
        self._ppd_step = laid_out[0]
        self._ppd_all_logits = scheduler_output.has_structured_output_requests
        prepared = super()._prepare_inputs(  # type: ignore[misc]
            scheduler_output, num_scheduled_tokens
        )
        place_trees(self, *laid_out, self._ppd_rows)
        return prepared

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
        """Logits of nodes only: prompt rows need theirs only where a walk ends."""
        step = self._ppd_step
        if step is None:
            rows = cu_num_scheduled_tokens[: len(num_draft_tokens)] - 1
        else:
            rows = step.node_rows
        if step is not None and self._ppd_all_logits:
            # vLLM's grammar masks expect logits for every scheduled draft.
            rows = ranges(step.starts, step.num_rows)
            firsts = np.cumsum(step.num_rows) - step.num_rows
            self._ppd_logit_rows = ranges(firsts, step.num_nodes)
        else:
            self._ppd_logit_rows = None
        # Only logits_indices is read: verification and proposal are ours.
        nothing = torch.empty(0, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=nothing,
            num_draft_tokens=[0],
            cu_num_draft_tokens=nothing,
            cu_num_sampled_tokens=nothing,
            target_logits_indices=nothing,
            bonus_logits_indices=nothing,
            logits_indices=self.to_device(rows),
        )

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # The scheduler cuts trees at the model's length; nothing else can overflow.
        return True

    def _sample(
        self, logits: torch.Tensor, spec_decode_metadata: SpecDecodeMetadata
    ) -> SamplerOutput:
        step = self._ppd_step
        if step is None:
            # Nobody guessed: vLLM's own sampling, as if without speculation.
            output = super()._sample(logits, None)  # type: ignore[misc]
            if self.speculative_config is None:
                # vLLM will not ask for guesses.
                self._end_step(self.input_batch.num_reqs, None)  # type: ignore
            return output
        step_context.set_current(None)
        if self._ppd_logit_rows is not None:
            logits = logits[self.to_device(self._ppd_logit_rows)]
        tokens = self.input_ids.np[step.node_rows]  # type: ignore[attr-defined]
        self._ppd_walk, sources, targets, output = walk_trees(
            self, step, tokens, logits
        )
        if sources.size:
            self._ppd_mover.move(sources, targets)
        if self._ppd_table is not None:
            self._ppd_table.after_walk(step, self._ppd_walk, tokens, logits)
        return output

    def _end_step(self, batch: int, sampled: list[list[int]] | None) -> int:
        """Count the step of `batch` requests and return the first tree of the next
        one, 0 for none. Plain steps end before vLLM has a list of what it sampled."""
        drafter, step, walk = self.drafter, self._ppd_step, self._ppd_walk
        online = self._ppd_online
        lengths = self.input_batch.num_tokens_no_spec  # type: ignore[attr-defined]
        drafter.note_lengths(lengths[:batch], self._ppd_new)
        changes = 0 if online is None else online.changes
        self._ppd_log.after_step(drafter, batch, step, walk, changes)
        if online is not None and online.after_step(batch, step, walk):
            # DraftInputs pending elsewhere were laid out for trees that are gone.
            self.ppd_trees = dict.fromkeys(self.ppd_trees, 0)
        if online is not None and step is None and online.glances_now:
            self._glance(batch, online)
        first_tree = drafter.first_tree(batch)
        if not first_tree or self._all_opted_out(self.input_batch.req_ids):  # type: ignore
            return 0
        if online is None:
            return first_tree
        if sampled is not None:
            emitted = sum(map(len, sampled))
        else:
            # What vLLM will drop, because a prompt goes on.
            dropped = self.discard_request_mask.np[:batch]  # type: ignore[attr-defined]
            emitted = batch - int(np.count_nonzero(dropped))
        pays = online.pays(step, batch, emitted, self._ppd_rows, self._ppd_new)
        return first_tree if pays else 0

    def _all_opted_out(self, request_ids: Iterable[str]) -> bool:
        out = self.ppd_opted_out
        return bool(out) and out.issuperset(request_ids)

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
        step = self._ppd_step
        first_tree = self._end_step(batch, sampled_token_ids)
        if not first_tree:
            return [[]] * batch
        tables = drafter.tables
        counts = np.zeros(batch, dtype=np.int64)
        logits = drafter.no_logits
        if step is not None and self._ppd_walk is not None:
            rows, counts = step.prompt_rows(self._ppd_walk.nodes)
            if rows.size:
                logits = self.model.compute_logits(  # type: ignore[attr-defined]
                    hidden_states[self.to_device(rows)]
                ).float()
                if tables.num_ept > 1:
                    logits = logits.unflatten(0, (-1, tables.num_ept)).mean(1)
        classes, chains = self._match(batch)
        trees = first_tree + classes * drafter.num_states + counts
        self._learn_matches(classes, chains, tables.tries_ngram[trees])
        request_ids = self.input_batch.req_ids  # type: ignore[attr-defined]
        self.ppd_trees.update(zip(request_ids, trees.tolist(), strict=True))
        lengths = tables.num_rows[trees].tolist()
        if max(lengths) == 1:
            return [[]] * batch
        roots = np.array([tokens[-1] if tokens else 0 for tokens in sampled_token_ids])
        ids = drafter.fill(trees, DraftInputs(counts, logits, roots, chains)).tolist()
        grammar = scheduler_output.has_structured_output_requests
        drafts = []
        for index, request_id in enumerate(request_ids):
            silent = (
                not sampled_token_ids[index]
                or request_id in self.ppd_opted_out
                or (grammar and self._has_grammar(request_id))
            )
            drafts.append([] if silent else ids[index][: lengths[index] - 1])
        return drafts

    def _match(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """[B] match classes and [B, L] chains of the requests' own contexts."""
        if self.drafter.num_classes == 1:
            return np.zeros(batch, dtype=np.int64), _NO_CHAINS.repeat(batch, axis=0)
        inputs = self.input_batch  # type: ignore[attr-defined]
        ends, token_ids = inputs.num_tokens_no_spec[:batch], inputs.token_ids_cpu
        return match_ngrams_cpu(token_ids, ends, _MATCHED)

    def _glance(self, batch: int, online: OnlineTrees) -> None:
        inputs = self.input_batch  # type: ignore[attr-defined]
        online.glance(
            inputs.req_ids,
            inputs.token_ids_cpu[:batch],
            inputs.num_prompt_tokens[:batch],
            inputs.num_tokens_no_spec[:batch],
            _MATCHED,
            match_ngrams_cpu,
        )

    def _learn_matches(
        self, classes: np.ndarray, chains: np.ndarray, tried: np.ndarray
    ) -> None:
        if self._ppd_online is None or self.drafter.num_classes == 1:
            return
        inputs = self.input_batch  # type: ignore[attr-defined]
        ends = inputs.num_tokens_no_spec[: len(classes)]
        self._ppd_online.after_match(
            inputs.req_ids, classes, chains, tried, ends, inputs.token_ids_cpu
        )

    def ppd_report(self) -> dict[str, Any]:
        """The plan that is served and what it was found from, how often it changed,
        and the log's next line."""
        drafter, online = self.drafter, self._ppd_online
        evidence = online.evidence if online else drafter.plan_settings.evidence()
        return {
            "plan": drafter.plan.to_dict(),
            "evidence": evidence.to_dict(),
            "profile": (online.profile if online else drafter.profile).to_dict(),
            "timings": [t._asdict() for t in online.timings] if online else [],
            "plan_changes": online.changes if online is not None else 0,
            "line": self._ppd_log.line(),
        }

    def ppd_hold(self, plan: dict[str, Any] | None) -> None:
        """No longer follow the traffic, and serve `plan` if there is one.

        What was learnt stays. While no request runs.
        """
        if self._ppd_online is not None:
            self._ppd_online.close()
        self._ppd_online = self._ppd_table = None
        if plan is not None:
            self.drafter.set_plan(TreePlan.from_dict(plan))
            self.ppd_trees.clear()

    def _has_grammar(self, request_id: str) -> bool:
        # A grammar is checked along one chain of tokens; a tree's siblings are none.
        params = self.requests[request_id].sampling_params  # type: ignore
        return params is not None and params.structured_outputs is not None

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        device = self.device  # type: ignore[attr-defined]
        if device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)
