"""PPD in vLLM's V2 model runner: only what V2 does differently. In the order of a start
and of a step:

``__init__``             PPD's speculator where vLLM would look up one of its own
``load_model``           prompt tokens into the embedding, trees into the model state
``initialize_kv_cache``  the caches that accepted paths are moved in; CUDA graphs of
                         the steps that the menu makes
``sample``               logits for nodes only; then move the accepted paths
``sample_tokens``        how many scheduled rows were draft tokens, for vLLM's metrics

A step without drafts runs vLLM's own code, and before it nothing is drafted.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
import vllm.v1.worker.gpu.model_runner as model_runner
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logits_processor.loader import LOGITSPROCS_GROUP

from vllm_ppd.engine.attention import require_tree_attention
from vllm_ppd.engine.counters import counts_of
from vllm_ppd.engine.patches import replaced
from vllm_ppd.engine.scheduling import attach_draft_counts
from vllm_ppd.engine.settings import serving_settings
from vllm_ppd.engine.soft_tokens import add_soft_tokens
from vllm_ppd.engine.v2.bigram_learner import BigramLearner
from vllm_ppd.engine.v2.counters import DeviceStepLog
from vllm_ppd.engine.v2.drafting import PPDSpeculator, WordDraftsHandler
from vllm_ppd.engine.v2.graphs import graphs_of, served_graphs
from vllm_ppd.engine.v2.kv_move import PathMover
from vllm_ppd.engine.v2.model_state import with_trees
from vllm_ppd.engine.v2.sampling import TreeSampler
from vllm_ppd.engine.v2.step_trees import step_of
from vllm_ppd.trees.menu import TreeMenu

# Methods of vLLM's runner that the mixin overrides; their contract is tested.
OVERRIDDEN = ("load_model", "initialize_kv_cache", "sample", "sample_tokens")


class TreeRunnerMixin:
    """Goes before a V2 ``GPUModelRunner`` in the bases of a model runner."""

    speculator: PPDSpeculator
    vllm_config: Any

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        # vLLM looks the speculator up by method, in a function that it calls by its
        # module's name for it; there is no method to override.
        with replaced(model_runner, "init_speculator", PPDSpeculator):
            super().__init__(vllm_config, device)  # type: ignore[call-arg]
        self.draft_tokens_handler = WordDraftsHandler(device, self.vocab_size)  # type: ignore
        self.ppd_log: DeviceStepLog | None = None
        # Of the step whose output is being made; None for a plain step.
        self._ppd_draft_counts: Any = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner: Any = self
        settings = serving_settings(self.vllm_config)
        add_soft_tokens(runner.model, settings.path, settings.vocab_size)
        speculator = self.speculator
        speculator.model = runner.model
        installed = entry_points(group=LOGITSPROCS_GROUP)
        custom = bool(installed or self.vllm_config.model_config.logits_processors)
        runner.model_state = with_trees(
            runner.model_state, speculator.requests, speculator.buffers, custom
        )
        runner.rejection_sampler = TreeSampler(runner.sampler, settings.vocab_size)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        runner: Any = self
        rows = self.speculator.requests.row_bounds
        with graphs_of(served_graphs(rows, runner.max_num_reqs)):
            super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        require_tree_attention(runner)
        self.ppd_mover = PathMover(self)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any
    ) -> Any:
        step = step_of(input_batch)
        if step is not None:
            input_batch = step.with_node_logits(input_batch)
        output = super().sample(  # type: ignore[misc]
            hidden_states, input_batch, grammar_output
        )
        self._ppd_draft_counts = None
        if step is not None and step.walk is not None:
            self.ppd_mover.move(step.walk, step.starts)
            # Ahead of the output's own copies: whoever has those has these too.
            self._ppd_draft_counts = async_copy_to_np(step.num_draft_tokens())
        if self.ppd_log is not None:
            self.ppd_log.after_step(input_batch.num_reqs, step)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if output is not None and self._ppd_draft_counts is not None:
            attach_draft_counts(output, self._ppd_draft_counts)
        return output

    def ppd_processors(self) -> tuple[Any, str, Any]:
        """Where the logits processors are, and what stands for none."""
        return self.sampler, "logits_processors", []  # type: ignore[attr-defined]

    @property
    def ppd_menu(self) -> TreeMenu:
        """The trees that are served, chains among them."""
        return self.speculator.requests.menu

    def ppd_pend(self, request_id: str, tree_id: int, drafts: list[int]) -> None:
        """Have a request's next step run this tree with these drafts."""
        states: Any = self.req_states  # type: ignore[attr-defined]
        slot = states.req_id_to_index[request_id]
        self.speculator.requests.put(slot, tree_id)
        states.draft_tokens[slot, : len(drafts)] = torch.tensor(drafts)

    def start_serving(self) -> None:
        """Count and learn from now on; what ran before was no traffic."""
        runner: Any = self
        speculator = self.speculator
        if speculator.online_bigram is not None:
            runner.rejection_sampler.learner = BigramLearner(
                speculator.online_bigram, runner.num_speculative_steps + 1
            )
        if get_tensor_model_parallel_rank() == 0:
            # Other ranks would count the same.
            num_prompted = speculator.requests.menu.num_prompt_tokens + 1
            counts = counts_of(self.vllm_config, num_prompted, publish=True)
            self.ppd_log = DeviceStepLog(speculator.requests, counts)


@cache
def runner_class(stock: type) -> type:
    """PPD's subclass of one of vLLM's V2 model runners."""
    return type(f"PPD{stock.__name__}", (TreeRunnerMixin, stock), {})
