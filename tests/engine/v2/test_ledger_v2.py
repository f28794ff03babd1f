"""The ledger's contract for V2: what is patched, overridden or relied on is there."""

from __future__ import annotations

import inspect
import pickle
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import vllm
import vllm.config.vllm as vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import (
    ChunkedLocalAttention,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from tests.engine.test_patches import check_overrides, check_seam, parameters, seams
from vllm_ppd.config import PPDConfigError
from vllm_ppd.engine.settings import PPDSpeculativeConfig

# See tests/engine/test_patches.py.
SEAMS = """
config:SpeculativeConfig has method num_speculative_tokens target_model_config \
    target_parallel_config draft_model_config draft_parallel_config
config.vllm:VllmConfig.__post_init__ calls get_args(NgramGPUTypes)
v1.outputs:ModelRunnerOutput has req_ids sampled_token_ids
v1.core.sched.output:NewRequestData has req_id prompt_token_ids prefill_token_ids \
    block_ids
v1.core.sched.output:SchedulerOutput has num_spec_tokens_to_schedule \
    scheduled_spec_decode_tokens
v1.core.sched.scheduler:Scheduler
    update_from_output takes scheduler_output model_runner_output
    update_from_output calls scheduler_output.num_invalid_spec_tokens
    # First steps are padded only without a look-up table.
    schedule calls self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None
# A request's placeholders are as many as the step that drafted them was told.
v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule calls \
    num_spec_tokens_to_schedule request.spec_token_ids
v1.worker.cpu_worker:CPUWorker
    init_device calls CPUModelRunnerV2(
    compile_or_warm_up_model takes
v1.worker.gpu_worker:Worker
    __init__ takes vllm_config ...
    _make_model_runner takes
    compile_or_warm_up_model takes
v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params calls self.logits_processors
v1.worker.gpu.model_runner:init_speculator takes vllm_config device req_states
v1.worker.gpu.model_runner:GPUModelRunner has max_num_reqs vocab_size \
    draft_tokens_handler
    __init__ takes vllm_config device
    __init__ calls self.speculative_config.use_ngram() init_speculator( \
    DraftTokensHandler(
    initialize_kv_cache calls ModelCudaGraphManager(
    # New requests start with drafts of zeros, and then get their tree.
    add_requests calls self.req_states.add_request( self.model_state.add_request( \
    self.req_states.apply_staged_writes() self.model_state.apply_staged_writes()
    # Positions and masks are written between slots and metadata.
    execute_model calls self.finish_requests( self.prepare_attn(input_batch) \
    self.model_state.preprocess_state( self.model_state.prepare_attn( \
    self.model_state.prepare_inputs(
    sample takes hidden_states input_batch grammar_output
    # A step without drafts is sampled by vLLM's own sampler.
    sample calls input_batch.num_draft_tokens self.sampler( self.rejection_sampler(
    sample_tokens takes grammar_output
    # Accepted paths move before the output leaves, and one batch travels along.
    sample_tokens calls self.execute_model_state.input_batch self.sample( \
    AsyncOutput( self.postprocess_sampled( self.speculator.propose( \
    num_speculative_tokens=num_spec_tokens self.req_states.draft_tokens[
v1.worker.gpu.cudagraph_utils:CudaGraphManager.__init__ calls self._init_candidates()
# Copies lie in order: what was begun before the output's is there with it.
v1.worker.gpu.async_utils:AsyncOutput.__init__ calls self.model_runner_output \
    copy_stream.wait_stream(main_stream) \
    async_copy_to_np(sampler_output.sampled_token_ids) \
    self.copy_event.record(copy_stream)
v1.worker.gpu.async_utils:async_copy_to_np takes x
v1.worker.gpu.input_batch:InputBatch has num_reqs num_tokens num_draft_tokens \
    num_scheduled_tokens idx_mapping idx_mapping_np query_start_loc seq_lens \
    seq_lens_cpu_upper_bound input_ids positions logits_indices cu_num_logits \
    cu_num_logits_np expanded_idx_mapping expanded_local_pos \
    has_structured_output_reqs
v1.worker.gpu.input_batch:get_num_sampled_and_rejected takes num_sampled seq_lens \
    cu_num_logits idx_mapping prefill_len
v1.worker.gpu.states:RequestState has max_num_reqs max_num_batched_tokens \
    num_speculative_steps all_token_ids total_len draft_tokens prefill_len
v1.worker.gpu.model_states.interface:ModelState
    add_request takes req_index new_req_data
    preprocess_state takes input_batch ...
v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn takes input_batch \
    ... for_capture
v1.worker.gpu.sample.sampler:Sampler has logprobs_mode compute_nans req_states \
    sampling_states
    get_logprobs_dims takes idx_mapping_np ...
    sample takes logits expanded_idx_mapping idx_mapping idx_mapping_np pos \
    input_ids expanded_local_pos seq_lens_upper_bound_np return_logprobs
v1.worker.gpu.sample.logprob:compute_topk_scores takes logits num_logprobs \
    sampled_token_ids cu_num_logits logprob_token_ids_state expanded_idx_mapping \
    max_per_req_token_ids logits_mode
v1.worker.gpu.spec_decode.utils:DraftTokensHandler
    __init__ takes device
    set_draft_tokens takes input_batch draft_tokens
v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose takes input_batch \
    attn_metadata slot_mappings last_hidden_states ... dummy_run is_profile \
    num_speculative_tokens
v1.worker.gpu.spec_decode.rejection_sampler:get_max_chunk_logits takes vocab_size ...
"""


@pytest.mark.parametrize(("place", "verb", "words"), seams(SEAMS))
def test_seams(place, verb, words):
    check_seam(place, verb, words)


@pytest.mark.parametrize(
    ("module", "mixin", "stock"),
    [
        ("runner", "TreeRunnerMixin", GPUModelRunner),
        ("model_state", "TreeStateMixin", DefaultModelState),
    ],
)
def test_every_override_is_listed_and_overrides_something(module, mixin, stock):
    # They need Triton, or its stub.
    ours = import_module(f"vllm_ppd.engine.v2.{module}")
    check_overrides(getattr(ours, mixin), ours.OVERRIDDEN, stock)


def test_what_a_speculator_must_have():
    assert BaseSpeculator.__abstractmethods__ == {
        *("init_cudagraph_manager", "capture", "propose"),
    }


def test_a_batch_takes_the_steps_trees_along():
    InputBatch.__new__(InputBatch).ppd_step = None  # type: ignore[attr-defined]


def test_both_schedulers_take_what_we_change_from_one_method():
    assert "update_from_output" not in vars(AsyncScheduler)


def test_what_takes_the_rejection_samplers_place_is_called_like_it():
    from vllm_ppd.engine.v2.sampling import TreeSampler

    assert parameters(RejectionSampler.__call__) == parameters(TreeSampler.__call__)


def test_the_method_is_none_that_vllm_keeps_off_v2():
    assert "ngram_gpu" in get_args(vllm_config.NgramGPUTypes)
    source = inspect.getsource(
        vllm_config.VllmConfig._get_v2_model_runner_unsupported_features
    )
    assert '"custom_class"' in source and '"ppd"' not in source


def test_the_speculative_settings_pickle():
    settings = PPDSpeculativeConfig(num_speculative_tokens=7, ppd={"ngram": False})
    copy = pickle.loads(pickle.dumps(settings))
    assert copy.ppd == settings.ppd and copy.method == "ppd"
    assert not copy.use_eagle() and not copy.use_ngram()
    assert copy.max_num_new_slots_for_drafting == 0
    # vLLM logs its configuration, and a menu is long.
    assert len(repr(copy)) < 80


def test_ngram_matches_are_looked_up_in_device_memory():
    settings = PPDSpeculativeConfig(num_speculative_tokens=7, ppd={"ngram": True})
    assert settings.use_ngram()
    # vLLM asks it for where token ids lie, and for the speculator that we replace.
    folder = Path(vllm.__file__).parent
    askers = [p for p in folder.rglob("*.py") if ".use_ngram()" in p.read_text()]
    assert sorted(str(path.relative_to(folder)) for path in askers) == [
        "v1/worker/gpu/model_runner.py",
        "v1/worker/gpu/spec_decode/__init__.py",
    ]


def test_attention_that_would_mask_causally():
    from vllm_ppd.engine.attention import TreeImplMixin, require_tree_attention

    def require(kind=Attention, impl=TreeImplMixin, dtype=torch.float32):
        layer = object.__new__(kind)
        layer.__dict__ |= {"impl": object.__new__(impl), "kv_cache_torch_dtype": dtype}
        layers = {"layers.0": layer, "experts": object()}
        model = SimpleNamespace(dtype=torch.float32)
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=model),
            compilation_config=SimpleNamespace(static_forward_context=layers),
        )
        require_tree_attention(runner)

    require()
    for bad, message in (
        ({"kind": ChunkedLocalAttention}, r"layers\.0 is ChunkedLocalAttention"),
        ({"impl": CPUAttentionBackendImpl}, r"layers\.0 runs CPUAttentionBackendImpl"),
        ({"dtype": torch.uint8}, r"layers\.0 has one of torch\.uint8"),
    ):
        with pytest.raises(PPDConfigError, match=message):
            require(**bad)


def test_caches_that_cannot_be_moved():
    from vllm_ppd.engine.v2.kv_move import PathMover

    def move(spec: Any) -> None:
        cache = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
        layers = {"layers.0": SimpleNamespace(kv_cache=cache)}
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layers.0"])
        runner = SimpleNamespace(
            block_tables=None,
            compilation_config=SimpleNamespace(static_forward_context=layers),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        )
        PathMover(runner)

    attention = FullAttentionSpec(
        block_size=3, num_kv_heads=2, head_size=4, dtype=torch.bfloat16
    )
    move(attention)
    with pytest.raises(PPDConfigError, match="plain attention layers, not str"):
        move("mamba")
