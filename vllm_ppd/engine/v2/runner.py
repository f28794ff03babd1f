"""PPD in vLLM's V2 model runner: what has to differ, and no more.

``__init__``             PPD's speculator where vLLM would look up one of its own
``load_model``           prompt tokens into the embedding, trees into the model state
``initialize_kv_cache``  the caches that accepted paths are moved in; CUDA graphs of
                         the steps that the plan makes
``sample``               logits for nodes only; then move the accepted paths
``sample_tokens``        how many of the drafts were candidates, for vLLM's metrics;
                         then perhaps other trees
``shutdown``             no search goes on
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.v1.worker.gpu.model_runner as model_runner
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_ppd.engine.counters import counts_of
from vllm_ppd.engine.profiling import measure_and_file
from vllm_ppd.engine.soft_tokens import add_soft_tokens
from vllm_ppd.engine.v2.candidate_rate import attach_candidates
from vllm_ppd.engine.v2.counters import DeviceStepLog
from vllm_ppd.engine.v2.drafts import WordDraftsHandler
from vllm_ppd.engine.v2.graphs import graphs_of, measured_graphs, served_graphs
from vllm_ppd.engine.v2.kv_move import PathMover
from vllm_ppd.engine.v2.measure import measure_profile, rows_to_measure
from vllm_ppd.engine.v2.model_state import with_trees
from vllm_ppd.engine.v2.online import DeviceOnlineTrees
from vllm_ppd.engine.v2.sampling import TreeSampler
from vllm_ppd.engine.v2.speculator import KEY, PPDSpeculator
from vllm_ppd.engine.v2.table_learner import DeviceTableLearner
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.plan_choice import PlanSettings

# Methods of vLLM's runner that the mixin overrides; their contract is tested.
OVERRIDDEN = (
    *("load_model", "initialize_kv_cache", "sample", "sample_tokens", "shutdown"),
)


class TreeRunnerMixin:
    """Goes before a V2 ``GPUModelRunner`` in the bases of a model runner."""

    speculator: PPDSpeculator

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        # vLLM looks the speculator up by method, in a function that it calls by its
        # module's name for it; there is no method to override.
        stock, model_runner.init_speculator = (
            model_runner.init_speculator,
            PPDSpeculator,
        )
        try:
            super().__init__(vllm_config, device)  # type: ignore[call-arg]
        finally:
            model_runner.init_speculator = stock
        self.draft_tokens_handler = WordDraftsHandler(device, self.vocab_size)  # type: ignore
        self._ppd_log: DeviceStepLog | None = None
        self._ppd_online: DeviceOnlineTrees | None = None
        self._ppd_running = 0
        # Of the step whose output is being made; None if nobody guessed.
        self._ppd_candidates: Any = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner: Any = self
        settings = runner.vllm_config.additional_config[KEY]["plan"]
        rows = PromptTokens.load(settings["path"]).rows
        add_soft_tokens(runner.model, rows, runner.vocab_size)
        trees = self.speculator.trees
        self.speculator.model = runner.model
        runner.model_state = with_trees(runner.model_state, trees)
        runner.rejection_sampler = TreeSampler(runner.sampler, trees, runner.vocab_size)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        runner: Any = self
        speculative, most = runner.speculative_config, runner.max_num_reqs
        sizes = served_graphs(
            speculative.num_speculative_tokens_per_batch_size,
            speculative.num_speculative_tokens,
            most,
        )
        if speculative.measure:
            rows = rows_to_measure(self.speculator.trees.row_bounds)
            sizes += measured_graphs(rows, most)
        with graphs_of(sizes):
            super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self._ppd_mover = PathMover(self)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any
    ) -> Any:
        trees, requests = self.speculator.trees, input_batch.num_reqs
        if input_batch.num_draft_tokens:
            input_batch = trees.with_node_logits(input_batch)
        output = super().sample(  # type: ignore[misc]
            hidden_states, input_batch, grammar_output
        )
        self._ppd_candidates, self._ppd_running = None, requests
        if trees.walk is not None:
            self._ppd_mover.move(trees.walk, trees.starts[:requests])
            # Ahead of the output's own copies, so whoever has those has these too.
            self._ppd_candidates = async_copy_to_np(trees.num_candidates(requests))
        if self._ppd_log is not None:
            online = self._ppd_online
            self._ppd_log.after_step(requests, online.changes if online else 0)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if output is not None and self._ppd_candidates is not None:
            attach_candidates(output, self._ppd_candidates)
        if output is not None and self._ppd_online is not None:
            self._ppd_online.after_step(self._ppd_running)
        return output

    def shutdown(self) -> None:
        if self._ppd_online is not None:
            self._ppd_online.close()
        super().shutdown()  # type: ignore[misc]

    def measure_machine(self) -> None:
        """Time steps if this start has to, for the next start.

        How many rows a step has is settled by now, and with it all that a profile
        could change.
        """
        runner: Any = self
        if runner.speculative_config.measure:
            key = runner.vllm_config.additional_config[KEY]["profile_key"]
            measure_and_file(
                lambda quiet: measure_profile(self, key, quiet),
                "; this start's trees are those of a typical machine, the next one's "
                "will be chosen by what was measured",
            )

    def start_serving(self) -> None:
        """Count and learn from now on; what ran before was no traffic."""
        runner: Any = self
        live, drafts = self.speculator.online_bigram, runner.num_speculative_steps
        if live is not None:
            runner.rejection_sampler.learner = DeviceTableLearner(live, drafts + 1)
        if get_tensor_model_parallel_rank():
            # All ranks would count the same.
            return
        trees = self.speculator.trees
        states = trees.plan.num_prompt_tokens + 1
        counts = counts_of(self.vllm_config, states, publish=True)  # type: ignore
        self._ppd_log = DeviceStepLog(trees, counts)
        given = self.vllm_config.additional_config[KEY]  # type: ignore[attr-defined]
        settings = PlanSettings(**given["plan"])
        online = given["online"] and settings.tree is None
        alone = get_tp_group().world_size == 1
        if online and alone and trees.served_plan.speculating:
            self._ppd_online = DeviceOnlineTrees(trees, settings)

    def ppd_report(self) -> dict[str, Any]:
        """The plan that is served, and the log's next line."""
        line = None if self._ppd_log is None else self._ppd_log.line()
        online = self._ppd_online
        return {
            "plan": self.speculator.trees.plan.to_dict(),
            "plan_changes": 0 if online is None else online.changes,
            "line": line,
        }
