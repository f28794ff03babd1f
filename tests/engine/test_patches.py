"""The ledger's contract: everything patched or overridden is where we expect it.

Signatures, fields and the order of calls, of the vLLM that is installed.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.v1.attention.selector as selector
import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ppd.engine import patches
from vllm_ppd.engine.soft_tokens import SoftTokenEmbedding
from vllm_ppd.engine.v1.runner import OVERRIDDEN, PPDCPUModelRunner, PPDRunnerMixin
from vllm_ppd.plugin import register

# Functions and classes below vllm; indented lines are of methods of the class above.
# A function `takes` these parameters (after "..." others may stand, too) and `calls`,
# or names, these in this order; a class `has` fields, or attributes that __init__ sets.
SEAMS = """
engine.arg_utils:EngineArgs has speculative_config spec_method spec_model spec_tokens \
    additional_config attention_backend attention_config \
    compilation_config
    create_speculative_config takes target_model_config target_parallel_config
    add_cli_args takes parser
sampling_params:SamplingParams._validate_spec_decode takes speculative_config
v1.engine.core:EngineCore
    _initialize_kv_caches takes vllm_config
    # Plugins are loaded, workers warm up, then the scheduler is built.
    __init__ calls load_general_plugins() self._initialize_kv_caches( \
    get_scheduler_cls()
    # An output that comes without asking for samples is taken for the step's.
    step calls self.model_executor.execute_model( model_output is None: sample_tokens(
    # Drafts are asked for after the step whose output brought them.
    post_step calls take_draft_token_ids
v1.core.sched.output:SchedulerOutput has num_spec_tokens_to_schedule \
    num_invalid_spec_tokens
v1.core.sched.scheduler:Scheduler has dynamic_sd_lookup
    update_from_output takes scheduler_output model_runner_output
    _handle_stopped_request takes request
    # The table is read at each step, and its answer sent to the workers.
    schedule calls self.dynamic_sd_lookup[ num_spec_tokens_to_schedule= \
    self._update_after_schedule(
    # Whether there is a grammar is known before the model is executed.
    _update_after_schedule calls scheduler_output.has_structured_output_requests
    make_spec_decoding_stats calls num_draft_tokens -= num_invalid_spec_tokens.get(
v1.request:Request has num_computed_tokens num_output_placeholders
v1.executor.multiproc_executor:MultiprocExecutor
    execute_model takes scheduler_output non_block
    sample_tokens takes grammar_output non_block
    take_draft_token_ids takes
v1.worker.cpu_worker:CPUWorker
    init_device calls CPUModelRunner(self.vllm_config
    execute_model takes scheduler_output
    sample_tokens takes grammar_output
v1.worker.gpu_worker:Worker._make_model_runner takes
v1.worker.gpu_model_runner:GPUModelRunner
    _prepare_inputs takes scheduler_output num_scheduled_tokens
    _calc_spec_decode_metadata takes num_draft_tokens cu_num_scheduled_tokens
    _sample takes logits spec_decode_metadata
    _input_fits_in_drafter takes common_attn_metadata
    _update_states takes scheduler_output
    propose_draft_token_ids takes scheduler_output sampled_token_ids \
    sampling_metadata hidden_states ...
    # Between them the step's trees are known, and its rows are padded.
    execute_model calls self._prepare_inputs( \
    self._determine_batch_execution_and_padding( self._get_slot_mappings(
    # PPD's runner takes the speculative configuration away for steps without draft
    # rows, before they begin: such a runner is a plain one.
    execute_model calls self._update_states( self._prepare_inputs( \
    self.model.compute_logits(
    _prepare_inputs calls self.discard_request_mask.np[:num_reqs] use_spec_decode \
    self.speculative_config
    _build_attention_metadata calls self.speculative_config spec_decode_common
    sample_tokens calls self._sample(logits self.speculative_config
    # And so there are no drafts to take.
    sample_tokens calls self._sample(logits self._draft_token_req_ids
    take_draft_token_ids calls self._draft_token_req_ids
    # What vLLM drops of the sampled tokens, counted before it does.
    _bookkeeping_sync calls self.discard_request_mask.np[:num_reqs]
v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder._set_isa_to_layers takes \
    layer_names
v1.attention.backends.registry:register_backend takes backend class_path ...
v1.sample.logits_processor:build_logitsprocs takes vllm_config ...
v1.worker.gpu_model_runner:GPUModelRunner.__init__ calls logitsprocs=build_logitsprocs(
v1.worker.gpu_input_batch:InputBatch.refresh_metadata calls self.logitsprocs
model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward takes \
    input_
"""


def seams(table: str) -> list[Any]:
    """The table's lines as parameters of a test: place, verb and words."""
    found, owner = [], ""
    for line in table.strip().splitlines():
        place, *words = line.split()
        if place == "#":
            continue
        if line[0] == " ":
            place = f"{owner}.{place}"
        else:
            owner = place
        if words:
            found.append(pytest.param(place, words[0], words[1:], id=place))
    return found


def original(function: Any) -> Any:
    return getattr(function, patches._MARK, function)


def parameters(function: Any) -> list[str]:
    names = inspect.signature(original(function)).parameters
    return [name for name in names if name != "self"]


def check_seam(place: str, verb: str, words: list[str]) -> None:
    subject = resolve_name(f"vllm.{place}")
    if verb == "takes":
        found = parameters(subject)
        if "..." in words:
            first = words.index("...")
            assert set(words[first:]) <= {*found, "..."}
            found, words = found[:first], words[:first]
        assert found == words
    elif verb == "calls":
        source, position = inspect.getsource(original(subject)), 0
        for word in words:
            position = source.find(word, position)
            assert position >= 0, word
    elif dataclasses.is_dataclass(subject):
        assert set(words) <= {field.name for field in dataclasses.fields(subject)}
    else:
        init = inspect.unwrap(original(subject.__init__))
        assert set(words) <= set(init.__code__.co_names)


def check_overrides(mixin: type, listed: tuple[str, ...], stock: type) -> None:
    """Every method that overrides one is listed, and the listed ones do."""
    ours = [n for n in vars(mixin) if hasattr(stock, n) and not n.startswith("__")]
    assert sorted(ours) == sorted(listed)
    assert all(callable(getattr(stock, name)) for name in listed)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.mark.parametrize(("place", "verb", "words"), seams(SEAMS))
def test_seams(place, verb, words):
    check_seam(place, verb, words)


def test_overridden_runner_methods_are_listed():
    check_overrides(PPDRunnerMixin, OVERRIDDEN, GPUModelRunner)
    assert issubclass(PPDCPUModelRunner, CPUModelRunner)
    # The CPU worker names its runner's class in its module.
    assert cpu_worker.CPUModelRunner is CPUModelRunner


def test_every_name_of_the_ledger_has_a_contract(monkeypatch):
    """And whatever is patched in every process is an entry of the ledger."""
    ledger = str(patches.__doc__)
    names = re.findall(r"``([\w.]+)``", ledger)
    for methods in re.findall(r"\(([\w,\s]+)\)", ledger.partition("\nSubclassed: ")[2]):
        names += methods.replace(",", " ").split()
    folder = Path(__file__).parent
    files = folder / "test_patches.py", folder / "v2" / "test_ledger_v2.py"
    contracts = set(re.findall(r"\w+", "".join(file.read_text() for file in files)))
    assert {name.split(".")[-1] for name in names} <= contracts
    wrapped = []
    monkeypatch.setattr(patches, "wrap", lambda *what: wrapped.append(what))
    patches.apply_patches()
    entries = re.findall(
        r"^- ``([\w.]+)``: ", ledger.partition("\n\nPatched where")[0], re.M
    )
    assert sorted(entries) == sorted(
        f"{owner.__name__}.{name}" for owner, name, _ in wrapped
    )


@pytest.mark.parametrize(
    "backend", [CPUAttentionBackend, FlashAttentionBackend, TritonAttentionBackend]
)
def test_what_attention_backends_are_called_with(backend):
    forward = ["layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    assert parameters(backend.get_impl_cls().forward)[:7] == forward
    build = ["common_prefix_len", "common_attn_metadata"]
    assert parameters(backend.get_builder_cls().build)[:2] == build


def test_patching_twice_changes_nothing():
    before = EngineArgs.create_speculative_config, EngineArgs.add_cli_args
    register()
    assert before == (EngineArgs.create_speculative_config, EngineArgs.add_cli_args)
    assert not hasattr(original(before[0]), patches._MARK)
    assert isinstance(vars(EngineArgs)["add_cli_args"], staticmethod)


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


def test_min_p_is_refused_without_ppd_alone():
    with pytest.raises(VLLMValidationError, match="min_p"):
        SamplingParams(min_p=0.5)._validate_spec_decode(SimpleNamespace())
    SamplingParams(min_p=0.5)._validate_spec_decode(SimpleNamespace(ppd={}))


def test_the_chosen_backend_can_be_forgotten():
    selector._cached_get_attn_backend.cache_clear()
    assert {"CPU_ATTN", "CUSTOM"} <= set(AttentionBackendEnum.__members__)


def test_padding_and_soft_tokens_are_looked_up_within_their_tables(monkeypatch):
    words, soft = torch.arange(5.0)[:, None], torch.tensor([[10.0], [11.0]])

    def within(self: Any, ids: torch.Tensor) -> torch.Tensor:
        assert ((ids >= 0) & (ids < 5)).all()
        return words[ids]

    monkeypatch.setattr(VocabParallelEmbedding, "forward", within)
    embedding = object.__new__(SoftTokenEmbedding)
    embedding.__dict__ |= {"first_soft_id": 5, "soft_table": soft}
    ids = torch.tensor([-1, 5, 6, 0, 4])
    assert embedding.forward(ids)[:, 0].tolist() == [0, 10, 11, 0, 4]
    assert ids.tolist() == [-1, 5, 6, 0, 4]
