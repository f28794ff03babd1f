"""The ledger's contract: everything patched or overridden is where we expect it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
import vllm.v1.attention.selector as selector
import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ppd.engine import patches
from vllm_ppd.engine.soft_tokens import SoftTokenEmbedding
from vllm_ppd.engine.v1.runner import (
    OVERRIDDEN,
    PPDCPUModelRunner,
    PPDRunnerMixin,
)
from vllm_ppd.plugin import register


def original(function):
    return getattr(function, patches._MARK, function)


def parameters(function) -> list[str]:
    return list(inspect.signature(original(function)).parameters)


def test_create_speculative_config():
    register()
    assert parameters(EngineArgs.create_speculative_config) == [
        "self",
        "target_model_config",
        "target_parallel_config",
    ]
    fields = EngineArgs.__dataclass_fields__
    for name in (
        *("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        *("additional_config", "attention_backend", "compilation_config"),
    ):
        assert name in fields


def test_add_cli_args():
    assert isinstance(vars(EngineArgs)["add_cli_args"], staticmethod)
    assert parameters(EngineArgs.add_cli_args) == ["parser"]


def test_scheduler_seams():
    """The draft length controller is the scheduler's own look-up table."""
    register()
    assert parameters(EngineCore._initialize_kv_caches) == ["self", "vllm_config"]
    assert parameters(Scheduler.update_from_output) == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]
    # Plugins are loaded, workers warm up, then the scheduler is built.
    source = inspect.getsource(EngineCore.__init__)
    order = [
        source.index(call)
        for call in (
            "load_general_plugins()",
            "self._initialize_kv_caches(",
            "get_scheduler_cls()",
        )
    ]
    assert order == sorted(order)
    source = inspect.getsource(original(Scheduler.__init__))
    assert "self.dynamic_sd_lookup" in source
    # The table is read at each step, and its answer sent to the workers.
    source = inspect.getsource(Scheduler.schedule)
    assert "self.dynamic_sd_lookup[" in source
    assert "num_spec_tokens_to_schedule" in SchedulerOutput.__dataclass_fields__


def test_the_executor_sees_every_step():
    assert parameters(MultiprocExecutor.execute_model) == [
        "self",
        "scheduler_output",
        "non_block",
    ]
    assert parameters(MultiprocExecutor.sample_tokens) == [
        "self",
        "grammar_output",
        "non_block",
    ]
    assert parameters(MultiprocExecutor.take_draft_token_ids) == ["self"]
    # The engine core asks for drafts after the step whose output brought them.
    assert "take_draft_token_ids" in inspect.getsource(EngineCore.post_step)
    assert "num_invalid_spec_tokens" in SchedulerOutput.__dataclass_fields__
    source = inspect.getsource(Scheduler.make_spec_decoding_stats)
    assert "num_draft_tokens -= num_invalid_spec_tokens" in source
    assert parameters(cpu_worker.CPUWorker.sample_tokens) == ["self", "grammar_output"]
    # An output that comes without asking for samples is taken for the step's.
    assert parameters(cpu_worker.CPUWorker.execute_model) == [
        "self",
        "scheduler_output",
    ]
    source = " ".join(inspect.getsource(EngineCore.step).split())
    assert "if model_output is None: model_output = self.model_exec" in source
    # Whether there is a grammar is known before the model is executed.
    source = inspect.getsource(Scheduler._update_after_schedule)
    assert "scheduler_output.has_structured_output_requests |=" in source
    assert "_update_after_schedule" in inspect.getsource(Scheduler.schedule)


def test_patching_twice_changes_nothing():
    register()
    before = EngineArgs.create_speculative_config, EngineArgs.add_cli_args
    register()
    assert before == (EngineArgs.create_speculative_config, EngineArgs.add_cli_args)
    assert not hasattr(original(before[0]), patches._MARK)


def test_the_cpu_worker_names_its_runner_class_in_its_module():
    assert cpu_worker.CPUModelRunner is CPUModelRunner
    source = inspect.getsource(cpu_worker.CPUWorker.init_device)
    assert "CPUModelRunner(self.vllm_config" in source


def test_gpu_worker_seam():
    assert parameters(Worker._make_model_runner) == ["self"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_runner_methods_exist(name):
    assert name in vars(PPDRunnerMixin)
    assert callable(getattr(GPUModelRunner, name))


def test_every_override_is_listed():
    stock = dir(GPUModelRunner)
    ours = [n for n in vars(PPDRunnerMixin) if n in stock and not n.startswith("__")]
    assert sorted(ours) == sorted(OVERRIDDEN)
    assert issubclass(PPDCPUModelRunner, CPUModelRunner)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_prepare_inputs", ["scheduler_output", "num_scheduled_tokens"]),
        (
            "_calc_spec_decode_metadata",
            ["num_draft_tokens", "cu_num_scheduled_tokens"],
        ),
        ("_sample", ["logits", "spec_decode_metadata"]),
        ("_input_fits_in_drafter", ["common_attn_metadata"]),
        ("_update_states", ["scheduler_output"]),
    ],
)
def test_signatures(name, expected):
    assert parameters(getattr(GPUModelRunner, name)) == ["self", *expected]


def test_a_runner_without_speculative_config_is_a_plain_one():
    """PPD's runner takes it away for steps without guesses, before they begin."""
    runner = GPUModelRunner
    source = inspect.getsource(runner.execute_model)
    assert source.index("self._update_states(") < source.index("self._prepare_inputs(")
    source = inspect.getsource(runner._prepare_inputs)
    assert "use_spec_decode = self.speculative_config is not None" in source
    assert "self.discard_request_mask.np[:num_reqs] = (" in source
    source = inspect.getsource(runner._build_attention_metadata)
    assert "if self.speculative_config and spec_decode_common" in source
    source = inspect.getsource(runner.sample_tokens)
    sampled = source.index("self._sample(logits")
    assert sampled < source.index("spec_config = self.speculative_config")
    assert sampled < source.index("self._draft_token_req_ids = None")
    # And so there are no drafts to take.
    source = inspect.getsource(runner.take_draft_token_ids)
    assert "or not self._draft_token_req_ids" in source
    # What vLLM drops of the sampled tokens, counted before it does.
    source = inspect.getsource(runner._bookkeeping_sync)
    assert "self.discard_request_mask.np[:num_reqs]" in source


def test_proposal_gets_the_hidden_states():
    names = parameters(GPUModelRunner.propose_draft_token_ids)
    assert names[1:5] == [
        "scheduler_output",
        "sampled_token_ids",
        "sampling_metadata",
        "hidden_states",
    ]


def test_attention_seams():
    assert "layer" in parameters(cpu_attn.CPUAttentionBackendImpl.forward)
    assert parameters(cpu_attn.CPUAttentionMetadataBuilder.build)[1:3] == [
        "common_prefix_len",
        "common_attn_metadata",
    ]
    assert parameters(cpu_attn.CPUAttentionMetadataBuilder._set_isa_to_layers) == [
        "self",
        "layer_names",
    ]


def test_embedding_forward():
    assert parameters(VocabParallelEmbedding.forward) == ["self", "input_"]


def test_the_entry_point_is_installed():
    found = entry_points(group="vllm.general_plugins", name="ppd")
    assert [e.value for e in found] == ["vllm_ppd.plugin:register"]


def test_register_survives_a_vllm_it_does_not_know():
    code = (
        "import sys, types\n"
        "for name in ('vllm', 'vllm.engine', 'vllm.engine.arg_utils'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "from vllm_ppd.plugin import register\n"
        "register(); register()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "could not hook into this version of vLLM" in done.stderr


def test_what_samples_and_resumes_is_where_the_ledger_says():
    register()
    assert parameters(SamplingParams._validate_spec_decode) == [
        *("self", "speculative_config")
    ]
    assert parameters(Scheduler._handle_stopped_request) == ["self", "request"]
    selector._cached_get_attn_backend.cache_clear()
    with pytest.raises(VLLMValidationError, match="min_p"):
        SamplingParams(min_p=0.5)._validate_spec_decode(SimpleNamespace())
    SamplingParams(min_p=0.5)._validate_spec_decode(SimpleNamespace(ppd={}))


def test_padding_and_soft_tokens_are_looked_up_within_their_tables(monkeypatch):
    words, soft = torch.arange(5.0)[:, None], torch.tensor([[10.0], [11.0]])
    monkeypatch.setattr(
        VocabParallelEmbedding, "forward", lambda self, ids: words[_within(ids, 5)]
    )
    embedding = object.__new__(SoftTokenEmbedding)
    embedding.__dict__ |= {"first_soft_id": 5, "soft_table": soft}
    ids = torch.tensor([-1, 5, 6, 0, 4])
    assert embedding.forward(ids)[:, 0].tolist() == [0, 10, 11, 0, 4]
    assert ids.tolist() == [-1, 5, 6, 0, 4]


def _within(ids: torch.Tensor, size: int) -> torch.Tensor:
    assert ((ids >= 0) & (ids < size)).all()
    return ids
