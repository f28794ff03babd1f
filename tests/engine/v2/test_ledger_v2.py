"""The ledger's contract for V2: what is patched, overridden or relied on is there."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import vllm
import vllm.config.vllm as vllm_config
import vllm.v1.worker.gpu.model_runner as model_runner
from vllm.config import SpeculativeConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.async_utils import AsyncOutput, async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    get_max_chunk_logits,
)
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_worker import Worker

from vllm_ppd.engine import patches


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def mixins() -> list[tuple[type, tuple[str, ...], type]]:
    from vllm_ppd.engine.v2 import model_state, runner

    return [
        (runner.TreeRunnerMixin, runner.OVERRIDDEN, GPUModelRunner),
        (model_state.TreeStateMixin, model_state.OVERRIDDEN, DefaultModelState),
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_every_override_is_listed_and_overrides_something(index):
    mixin, listed, stock = mixins()[index]
    ours = [n for n in vars(mixin) if hasattr(stock, n) and not n.startswith("__")]
    assert sorted(ours) == sorted(listed)
    assert all(callable(getattr(stock, name)) for name in listed)


def test_the_speculator_is_looked_up_by_a_name_of_the_runners_module():
    assert parameters(model_runner.init_speculator) == [
        *("vllm_config", "device", "req_states"),
    ]
    source = inspect.getsource(GPUModelRunner.__init__)
    assert "init_speculator(" in source
    assert "self.draft_tokens_handler = DraftTokensHandler(" in source
    assert parameters(GPUModelRunner.__init__) == ["self", "vllm_config", "device"]
    assert parameters(DraftTokensHandler.__init__) == ["self", "device"]
    assert parameters(DraftTokensHandler.set_draft_tokens) == [
        *("self", "input_batch", "draft_tokens"),
    ]


def test_methods_that_we_override_and_call():
    assert parameters(GPUModelRunner.sample) == [
        *("self", "hidden_states", "input_batch", "grammar_output"),
    ]
    assert parameters(ModelState.add_request) == ["self", "req_index", "new_req_data"]
    assert parameters(ModelState.preprocess_state)[1] == "input_batch"
    prepare = inspect.signature(DefaultModelState.prepare_attn).parameters
    assert next(iter(prepare)) == "self" and "for_capture" in prepare
    assert list(prepare)[1] == "input_batch"
    assert parameters(BaseSpeculator.propose)[1:5] == [
        *("input_batch", "attn_metadata", "slot_mappings", "last_hidden_states"),
    ]
    assert {"dummy_run", "is_profile", "num_speculative_tokens"} <= set(
        parameters(BaseSpeculator.propose)
    )
    assert BaseSpeculator.__abstractmethods__ == {
        *("init_cudagraph_manager", "capture", "propose"),
    }


def test_positions_and_masks_are_written_between_slots_and_metadata():
    source = inspect.getsource(GPUModelRunner.execute_model)
    order = [
        source.index(call)
        for call in (
            "self.prepare_attn(input_batch)",
            "self.model_state.preprocess_state(",
            "self.model_state.prepare_attn(",
            "self.model_state.prepare_inputs(",
        )
    ]
    assert order == sorted(order)


def test_one_batch_travels_through_a_step():
    """A step's trees are an attribute of it."""
    batch = InputBatch.__new__(InputBatch)
    batch.ppd_step = None  # type: ignore[attr-defined]
    source = inspect.getsource(GPUModelRunner.execute_model)
    assert "input_batch=input_batch," in source
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    assert "input_batch = self.execute_model_state.input_batch" in source


def test_the_next_steps_draft_length_reaches_the_speculator():
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    assert "num_speculative_tokens=num_spec_tokens" in source
    # Columns that are not scheduled hold -1, which an embedding must bear.
    assert "draft_tokens[:, num_spec_tokens:] = -1" in source
    # A request keeps the number of placeholders of the step that made its drafts.
    source = inspect.getsource(AsyncScheduler._update_after_schedule)
    assert "scheduler_output.num_spec_tokens_to_schedule" in source
    assert "request.spec_token_ids = self._spec_token_placeholders" in source
    # First steps are padded only where there is no look-up table.
    source = inspect.getsource(Scheduler.schedule)
    assert "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None" in source


def test_accepted_paths_move_before_the_output_leaves():
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    order = [
        source.index(call)
        for call in (
            *("self.sample(", "AsyncOutput(", "self.postprocess_sampled("),
            *("self.speculator.propose(", "self.req_states.draft_tokens["),
        )
    ]
    assert order == sorted(order)


def test_draft_counts_reach_the_scheduler_with_the_output():
    assert parameters(GPUModelRunner.sample_tokens) == ["self", "grammar_output"]
    # Copies lie in order: what was begun before the output's is there with it.
    source = inspect.getsource(AsyncOutput.__init__)
    assert "self.model_runner_output = model_runner_output" in source
    order = [
        source.index(call)
        for call in (
            "copy_stream.wait_stream(main_stream)",
            "async_copy_to_np(sampler_output.sampled_token_ids)",
            "self.copy_event.record(copy_stream)",
        )
    ]
    assert order == sorted(order)
    assert "return self.model_runner_output" in inspect.getsource(
        AsyncOutput.get_output
    )
    assert parameters(async_copy_to_np) == ["x"]
    assert {"req_ids", "sampled_token_ids"} <= {
        field.name for field in dataclasses.fields(ModelRunnerOutput)
    }
    update = getattr(
        Scheduler.update_from_output, patches._MARK, Scheduler.update_from_output
    )
    assert parameters(update) == ["self", "scheduler_output", "model_runner_output"]
    assert "scheduler_output.num_invalid_spec_tokens" in inspect.getsource(update)
    # Both schedulers take it from there.
    assert "update_from_output" not in vars(AsyncScheduler)


def test_what_takes_the_rejection_samplers_place_is_called_like_it():
    from vllm_ppd.engine.v2.sampling import TreeSampler

    assert parameters(RejectionSampler.__call__) == parameters(TreeSampler.__call__)
    source = inspect.getsource(GPUModelRunner.sample)
    assert "input_batch.num_draft_tokens == 0" in source
    assert "self.rejection_sampler(" in source


def test_functions_of_the_sampler():
    assert parameters(Sampler.sample) == [
        *("self", "logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np"),
        *("pos", "input_ids", "expanded_local_pos", "seq_lens_upper_bound_np"),
        "return_logprobs",
    ]
    assert parameters(Sampler.get_logprobs_dims)[:2] == ["self", "idx_mapping_np"]
    assert parameters(get_num_sampled_and_rejected) == [
        *("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
    ]
    assert parameters(compute_topk_scores) == [
        *("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits"),
        *("logprob_token_ids_state", "expanded_idx_mapping", "max_per_req_token_ids"),
        "logits_mode",
    ]
    assert get_max_chunk_logits(1000) > 0
    source = inspect.getsource(Sampler.__init__)
    for name in ("logprobs_mode", "compute_nans", "req_states", "sampling_states"):
        assert f"self.{name} = " in source


def test_fields_of_the_batch():
    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert {
        *("num_reqs", "num_tokens", "num_draft_tokens", "num_scheduled_tokens"),
        *("idx_mapping", "idx_mapping_np", "query_start_loc", "seq_lens"),
        *("seq_lens_cpu_upper_bound", "input_ids", "positions", "logits_indices"),
        *("cu_num_logits", "cu_num_logits_np", "expanded_idx_mapping"),
        *("expanded_local_pos", "has_structured_output_reqs"),
    } <= fields


def test_states_of_requests():
    source = inspect.getsource(RequestState.__init__)
    for name in ("max_num_reqs", "max_num_batched_tokens", "num_speculative_steps"):
        assert f"self.{name} = {name}" in source
    assert "self.draft_tokens = torch.zeros(" in source
    assert "self.prefill_len = " in source
    # New requests start with drafts of zeros, which we then write over.
    order = inspect.getsource(GPUModelRunner.add_requests)
    assert order.index("self.req_states.add_request(") < order.index(
        "self.model_state.add_request("
    )
    assert order.index("self.req_states.apply_staged_writes()") < order.index(
        "self.model_state.apply_staged_writes()"
    )


def test_workers():
    assert parameters(Worker._make_model_runner) == ["self"]
    for worker in (Worker, CPUWorker):
        assert parameters(worker.compile_or_warm_up_model) == ["self"]
    assert parameters(Worker.__init__)[1] == "vllm_config"
    source = inspect.getsource(CPUWorker.init_device)
    assert "from vllm.v1.worker.cpu.model_runner import" in source
    assert "CPUModelRunnerV2(" in source


def test_asynchronous_scheduling_asks_for_the_method():
    source = inspect.getsource(vllm_config.VllmConfig.__post_init__)
    assert "not in get_args(NgramGPUTypes)" in source
    assert "ngram_gpu" in get_args(vllm_config.NgramGPUTypes)


def test_the_method_is_none_that_vllm_keeps_off_v2():
    source = inspect.getsource(
        vllm_config.VllmConfig._get_v2_model_runner_unsupported_features
    )
    assert '"custom_class"' in source and '"ppd"' not in source
    names = {field.name for field in dataclasses.fields(SpeculativeConfig)}
    assert {
        *("method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size"),
        *("target_model_config", "target_parallel_config"),
        *("draft_model_config", "draft_parallel_config"),
    } <= names


def test_the_speculative_settings_pickle():
    from vllm_ppd.engine.settings import PPDSpeculativeConfig

    settings = PPDSpeculativeConfig(num_speculative_tokens=7, ppd={"ngram": False})
    copy = pickle.loads(pickle.dumps(settings))
    assert copy.ppd == settings.ppd and copy.method == "ppd"
    assert not copy.use_eagle() and not copy.use_ngram()
    assert copy.max_num_new_slots_for_drafting == 0
    # vLLM logs its configuration, and a menu is long.
    assert len(repr(copy)) < 80


def test_ngram_matches_are_looked_up_in_device_memory():
    from vllm_ppd.engine.settings import PPDSpeculativeConfig

    settings = PPDSpeculativeConfig(num_speculative_tokens=7, ppd={"ngram": True})
    assert settings.use_ngram()
    # What vLLM asks it for, and nothing else on this runner but the speculator.
    source = inspect.getsource(GPUModelRunner.__init__)
    assert re.search(
        r"use_dense_all_token_ids = \(\s+self.speculative_config is not None and "
        r"self.speculative_config.use_ngram\(\)",
        source,
    )
    asked = [
        str(path.relative_to(Path(vllm.__file__).parent))
        for path in Path(vllm.__file__).parent.rglob("*.py")
        if ".use_ngram()" in path.read_text()
    ]
    assert sorted(asked) == [
        "v1/worker/gpu/model_runner.py",
        "v1/worker/gpu/spec_decode/__init__.py",
    ]


def test_what_is_measured_is_scheduled_like_requests():
    """Fields by which made-up steps reach the runner."""
    assert {"req_id", "prompt_token_ids", "prefill_token_ids", "block_ids"} <= {
        field.name for field in dataclasses.fields(NewRequestData)
    }
    assert {"num_spec_tokens_to_schedule", "scheduled_spec_decode_tokens"} <= {
        field.name for field in dataclasses.fields(SchedulerOutput)
    }
    source = inspect.getsource(GPUModelRunner.execute_model)
    assert "self.finish_requests(scheduler_output)" in source
    # As many drafts as the scheduler sends ahead of the device.
    assert "num_spec_tokens_to_schedule" in inspect.getsource(
        AsyncScheduler._update_after_schedule
    )
    source = inspect.getsource(GPUModelRunner.__init__)
    for name in ("max_model_len", "max_num_tokens", "max_num_reqs", "model_config"):
        assert f"self.{name} = " in source
