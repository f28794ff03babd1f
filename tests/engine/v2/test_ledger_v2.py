"""The ledger's contract for V2: what is patched, overridden or relied on is there.

Signatures, fields and the order of calls, of the vLLM that is installed.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from pkgutil import resolve_name
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
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ppd.config import PPDConfigError
from vllm_ppd.engine import patches
from vllm_ppd.engine.settings import PPDSpeculativeConfig

UPDATE = getattr(
    Scheduler.update_from_output, patches._MARK, Scheduler.update_from_output
)


def parameters(function: Any) -> list[str]:
    function = getattr(function, patches._MARK, function)
    return list(inspect.signature(function).parameters)


def mixins() -> list[tuple[type, tuple[str, ...], type]]:
    # They need Triton, or its stub.
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


# Below vllm.v1: a function and its parameters; after "..." others may stand, too.
SIGNATURES = """
worker.gpu.model_runner:init_speculator vllm_config device req_states
worker.gpu.model_runner:GPUModelRunner.__init__ self vllm_config device
worker.gpu.model_runner:GPUModelRunner.sample self hidden_states input_batch \
    grammar_output
worker.gpu.model_runner:GPUModelRunner.sample_tokens self grammar_output
worker.gpu.spec_decode.utils:DraftTokensHandler.__init__ self device
worker.gpu.spec_decode.utils:DraftTokensHandler.set_draft_tokens self input_batch \
    draft_tokens
worker.gpu.spec_decode.speculator:BaseSpeculator.propose self input_batch \
    attn_metadata slot_mappings last_hidden_states ... dummy_run is_profile \
    num_speculative_tokens
worker.gpu.spec_decode.rejection_sampler:get_max_chunk_logits vocab_size ...
worker.gpu.model_states.interface:ModelState.add_request self req_index new_req_data
worker.gpu.model_states.interface:ModelState.preprocess_state self input_batch ...
worker.gpu.model_states.default:DefaultModelState.prepare_attn self input_batch ... \
    for_capture
worker.gpu_worker:Worker.__init__ self vllm_config ...
worker.gpu_worker:Worker._make_model_runner self
worker.gpu_worker:Worker.compile_or_warm_up_model self
worker.cpu_worker:CPUWorker.compile_or_warm_up_model self
core.sched.scheduler:Scheduler.update_from_output self scheduler_output \
    model_runner_output
worker.gpu.async_utils:async_copy_to_np x
worker.gpu.sample.sampler:Sampler.get_logprobs_dims self idx_mapping_np ...
worker.gpu.sample.sampler:Sampler.sample self logits expanded_idx_mapping \
    idx_mapping idx_mapping_np pos input_ids expanded_local_pos \
    seq_lens_upper_bound_np return_logprobs
worker.gpu.input_batch:get_num_sampled_and_rejected num_sampled seq_lens \
    cu_num_logits idx_mapping prefill_len
worker.gpu.sample.logprob:compute_topk_scores logits num_logprobs sampled_token_ids \
    cu_num_logits logprob_token_ids_state expanded_idx_mapping max_per_req_token_ids \
    logits_mode
"""

# Fields of dataclasses, and attributes that __init__ sets.
FIELDS = """
v1.worker.gpu.input_batch:InputBatch num_reqs num_tokens num_draft_tokens \
    num_scheduled_tokens idx_mapping idx_mapping_np query_start_loc seq_lens \
    seq_lens_cpu_upper_bound input_ids positions logits_indices cu_num_logits \
    cu_num_logits_np expanded_idx_mapping expanded_local_pos \
    has_structured_output_reqs
config:SpeculativeConfig method num_speculative_tokens target_model_config \
    target_parallel_config draft_model_config draft_parallel_config
v1.outputs:ModelRunnerOutput req_ids sampled_token_ids
v1.core.sched.output:NewRequestData req_id prompt_token_ids prefill_token_ids block_ids
v1.core.sched.output:SchedulerOutput num_spec_tokens_to_schedule \
    scheduled_spec_decode_tokens
v1.worker.gpu.states:RequestState max_num_reqs max_num_batched_tokens \
    num_speculative_steps all_token_ids total_len draft_tokens prefill_len
v1.worker.gpu.sample.sampler:Sampler logprobs_mode compute_nans req_states \
    sampling_states
v1.worker.gpu.model_runner:GPUModelRunner max_num_reqs vocab_size draft_tokens_handler
"""


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


@pytest.mark.parametrize("row", rows(SIGNATURES), ids=lambda row: row[0])
def test_signatures(row):
    found = parameters(resolve_name(f"vllm.v1.{row[0]}"))
    first, _, others = " ".join(row[1:]).partition(" ...")
    if "..." in row:
        assert set(others.split()) <= set(found)
        found = found[: len(first.split())]
    assert found == first.split()


@pytest.mark.parametrize("row", rows(FIELDS), ids=lambda row: row[0])
def test_fields(row):
    kind, names = resolve_name(f"vllm.{row[0]}"), row[1:]
    if dataclasses.is_dataclass(kind):
        assert set(names) <= {field.name for field in dataclasses.fields(kind)}
    else:
        source = inspect.getsource(kind.__init__)
        assert [name for name in names if f"self.{name} = " not in source] == []


def test_what_a_speculator_must_have():
    assert BaseSpeculator.__abstractmethods__ == {
        *("init_cudagraph_manager", "capture", "propose"),
    }


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        # Positions and masks are written between slots and metadata.
        (
            GPUModelRunner.execute_model,
            "self.finish_requests( self.prepare_attn(input_batch) "
            "self.model_state.preprocess_state( self.model_state.prepare_attn( "
            "self.model_state.prepare_inputs(",
        ),
        # Accepted paths move before the output leaves, and one batch travels along.
        (
            GPUModelRunner.sample_tokens,
            "self.execute_model_state.input_batch self.sample( AsyncOutput( "
            "self.postprocess_sampled( self.speculator.propose( "
            "num_speculative_tokens=num_spec_tokens self.req_states.draft_tokens[",
        ),
        # Copies lie in order: what was begun before the output's is there with it.
        (
            AsyncOutput.__init__,
            "self.model_runner_output copy_stream.wait_stream(main_stream) "
            "async_copy_to_np(sampler_output.sampled_token_ids) "
            "self.copy_event.record(copy_stream)",
        ),
        # New requests start with drafts of zeros, and then get their tree.
        (
            GPUModelRunner.add_requests,
            "self.req_states.add_request( self.model_state.add_request( "
            "self.req_states.apply_staged_writes() "
            "self.model_state.apply_staged_writes()",
        ),
        (
            GPUModelRunner.__init__,
            "self.speculative_config.use_ngram() init_speculator( DraftTokensHandler(",
        ),
        # A step without drafts is sampled by vLLM's own sampler.
        (
            GPUModelRunner.sample,
            "input_batch.num_draft_tokens self.sampler( self.rejection_sampler(",
        ),
        # A request's placeholders are as many as the step that drafted them was told.
        (
            AsyncScheduler._update_after_schedule,
            "num_spec_tokens_to_schedule request.spec_token_ids",
        ),
        (UPDATE, "scheduler_output.num_invalid_spec_tokens"),
        (CPUWorker.init_device, "CPUModelRunnerV2("),
        (GPUModelRunner.initialize_kv_cache, "ModelCudaGraphManager("),
        (CudaGraphManager.__init__, "self._init_candidates()"),
        (vllm_config.VllmConfig.__post_init__, "get_args(NgramGPUTypes)"),
    ],
)
def test_order_of_calls(function, calls):
    source, place = inspect.getsource(function), 0
    for call in calls.split():
        place = source.find(call, place)
        assert place >= 0, call


def test_a_batch_takes_the_steps_trees_along():
    InputBatch.__new__(InputBatch).ppd_step = None  # type: ignore[attr-defined]


def test_first_steps_are_padded_only_without_a_look_up_table():
    source = " ".join(inspect.getsource(Scheduler.schedule).split())
    assert "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None" in source
    # Both schedulers take what we change from one method.
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
    askers = [
        path for path in folder.rglob("*.py") if ".use_ngram()" in path.read_text()
    ]
    assert sorted(str(path.relative_to(folder)) for path in askers) == [
        "v1/worker/gpu/model_runner.py",
        "v1/worker/gpu/spec_decode/__init__.py",
    ]


def test_attention_that_would_mask_causally():
    from vllm_ppd.engine.attention import TreeImplMixin, require_tree_attention
    from vllm_ppd.engine.v2 import attention

    ours = attention.PPDCPUAttentionBackendV2.get_builder_cls()

    def require(
        kind: type = Attention,
        impl: type = TreeImplMixin,
        builder: type = ours,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layer = object.__new__(kind)
        layer.__dict__ |= {
            "impl": object.__new__(impl),
            "kv_cache_torch_dtype": dtype,
        }
        group = SimpleNamespace(
            metadata_builders=[object.__new__(builder)], layer_names=["layers.0"]
        )
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(dtype=torch.float32)
            ),
            compilation_config=SimpleNamespace(
                static_forward_context={"layers.0": layer, "experts": object()}
            ),
            attn_groups=[[group]],
        )
        require_tree_attention(runner, attention.DeviceTreeMetadataMixin)

    require()
    for bad, message in (
        ({"kind": ChunkedLocalAttention}, r"layers\.0 is ChunkedLocalAttention"),
        ({"impl": CPUAttentionBackendImpl}, r"layers\.0 runs CPUAttentionBackendImpl"),
        (
            {"builder": CPUAttentionMetadataBuilder},
            r"layers\.0 runs CPUAttentionMetadataBuilder",
        ),
        ({"dtype": torch.uint8}, r"layers\.0 has one of torch\.uint8"),
    ):
        with pytest.raises(PPDConfigError, match=message):
            require(**bad)


def test_caches_that_cannot_be_moved():
    from vllm_ppd.engine.v2.kv_move import PathMover

    def move(spec: Any, dtype: torch.dtype) -> None:
        layer = SimpleNamespace(kv_cache=torch.zeros(1, 2, 3, 8, dtype=dtype))
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layers.0"])
        PathMover(
            SimpleNamespace(
                block_tables=None,
                compilation_config=SimpleNamespace(
                    static_forward_context={"layers.0": layer}
                ),
                kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
            )
        )

    attention = FullAttentionSpec(
        block_size=3, num_kv_heads=2, head_size=4, dtype=torch.bfloat16
    )
    move(attention, torch.bfloat16)
    with pytest.raises(PPDConfigError, match="8-bit"):
        move(attention, torch.uint8)
    with pytest.raises(PPDConfigError, match="plain attention layers, not str"):
        move("mamba", torch.bfloat16)
