"""The ledger of everything in vLLM that this plugin replaces.

Each entry says what is patched, why no official seam serves, since which vLLM it is
known to fit, and how to notice that vLLM moved (tests/engine/test_patches.py checks
every entry against the installed version). What is *overridden in subclasses* is
listed too, because a renamed method fails as silently as a moved function. 0.32 was
run on CPU; so were the Python files of 0.33, which has no CPU wheel, with the compiled
kernels of 0.32 (docs/versions.md).

Patched, in every process:
- ``EngineArgs.create_speculative_config``: vLLM's ``SpeculativeConfig.method`` is a
  closed list, and its ``custom_class`` method knows no settings. The wrapper handles
  PPD and calls the original for everything else. 0.32, 0.33.
- ``EngineArgs.add_cli_args``: adds ``--speculative-model``, another spelling of
  vLLM's own ``--spec-model``. 0.32, 0.33.
- ``EngineCore._initialize_kv_caches``: the one moment between the workers' warm-up and
  the scheduler; asks the workers for the profile that they measured. 0.32, 0.33.
- ``Scheduler.__init__``: its ``dynamic_sd_lookup`` (draft length by running requests)
  becomes the schedule of PPD's controller. A scheduler class of one's own changes how
  vLLM schedules, and its configured schedule is dropped with data parallelism, and for
  unknown methods on V1 by 0.33. 0.32, 0.33.
- ``SamplingParams._validate_spec_decode``: refuses min_p and logit_bias, which PPD
  serves, wherever the configuration speculates. 0.32, 0.33.
- ``Scheduler.update_from_output``: tells the controller each step's tokens and time,
  and vLLM how many scheduled rows are draft tokens. 0.32, 0.33.
- ``Scheduler._handle_stopped_request``: a session that goes on with its next input
  keeps ``num_computed_tokens`` tokens, from which accepted tokens past an end are not
  taken back (unless vLLM schedules ahead). 0.32, 0.33.

Patched where PPD is selected:
- attention backends ``CPU_ATTN`` and ``CUSTOM`` (in workers that run PPD only, through
  vLLM's ``register_backend``): tree rows need their own mask. The cache of
  ``vllm.v1.attention.selector`` is cleared then: it may hold the stock choice of an
  engine before. 0.32, 0.33.
- ``vllm.v1.worker.cpu_worker.CPUModelRunner`` (while PPD's worker builds its runner):
  the CPU worker names the class inline, without the GPU worker's
  ``_make_model_runner`` seam. 0.32, 0.33.
- the model's ``compute_logits`` (while the canary runs a step, before requests are
  served): makes the step emit what is to be compared. 0.32, 0.33.
- on V1 ``InputBatch.logitsprocs``, on V2 ``Sampler.logits_processors`` (while made-up
  requests are decoded): custom ones may need parameters that these do not have.
  0.32, 0.33.
- on V1, ``vllm.v1.worker.gpu_model_runner.build_logitsprocs`` (while a runner is
  built): leaves out min_p and logit_bias and refuses custom logits processors where the
  configuration speculates. 0.32, 0.33.
- on V2, ``vllm.v1.worker.gpu.model_runner.init_speculator`` and
  ``vllm.v1.worker.cpu.model_runner.CPUModelRunner`` (while a runner is built): both are
  looked up by name, with no method to override. 0.32, 0.33.
- on V2, ``vllm.config.vllm.NgramGPUTypes``: the methods for which vLLM schedules ahead
  of the device are a closed list. 0.32.
- on V2, ``vllm.v1.worker.gpu.model_runner.ModelCudaGraphManager`` (while a runner lists
  its CUDA graphs): its ``_init_candidates`` finds no full graph for many of the loads
  that have several row counts between them (v2/graphs.py). 0.32, 0.33.

Subclassed: ``CPUWorker`` (init_device, compile_or_warm_up_model, execute_model,
sample_tokens), ``MultiprocExecutor`` (execute_model, sample_tokens,
take_draft_token_ids), ``Worker`` (_make_model_runner, compile_or_warm_up_model), the V1
model runner (see v1/runner.py, OVERRIDDEN; in plain steps its ``speculative_config`` is
None), ``CPUAttentionBackend``, ``FlashAttentionBackend`` and ``TritonAttentionBackend``
with their builders (build) and implementations (forward), ``VocabParallelEmbedding``
(forward), ``SpeculativeConfig`` (use_ngram, by which vLLM's V2 runner decides where
token ids lie), the V2 model runners and model states (see v2/runner.py and
v2/model_state.py, OVERRIDDEN).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

# Marks a function that already is our wrapper, so that patching twice is harmless.
_MARK = "_vllm_ppd_original"


def wrap(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(current)`` in the place of a method, once."""
    current = getattr(owner, name)
    if hasattr(current, _MARK):
        return
    wrapper = functools.wraps(current)(make(current))
    setattr(wrapper, _MARK, current)
    is_static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have another value under a name of vLLM's for a while."""
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


def _with_ppd_method(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        from vllm_ppd.engine.select import create_ppd_config, speculative_dict

        speculative = speculative_dict(self)
        if speculative is None:
            return original(self, target_model_config, target_parallel_config)
        return create_ppd_config(
            self, speculative, target_model_config, target_parallel_config
        )

    return create_speculative_config


def _with_speculative_model_flag(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        # vLLM, or another plugin, may already have the flag.
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument(
                "--speculative-model",
                dest="spec_model",
                default=None,
                metavar="ppd:PATH",
                help="Speculate with the model's own trained prompt tokens (Parallel "
                "Prompt Decoding): 'ppd:' and a folder or hub id, or 'ppd' alone. "
                "Another name of --spec-model.",
            )
        return parser

    return add_cli_args


def _with_measured_profile(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        kv_cache_config = original(self, vllm_config)
        if _runs_ppd(vllm_config):
            from vllm_ppd.engine.scheduling import fetch_profile

            fetch_profile(vllm_config, self.model_executor)
        return kv_cache_config

    return _initialize_kv_caches


def _with_controller(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.ppd_observer = None
        if _runs_ppd(self.vllm_config):
            from vllm_ppd.engine.scheduling import attach_controller

            attach_controller(self)

    return __init__


def _with_observation(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        observer = self.ppd_observer
        if observer is None:
            return original(self, scheduler_output, model_runner_output)
        observer.before_update(scheduler_output, model_runner_output)
        outputs = original(self, scheduler_output, model_runner_output)
        observer.after_update(bool(self.running))
        return outputs

    return update_from_output


def _with_right_frontier(original: Callable[..., Any]) -> Callable[..., Any]:
    def _handle_stopped_request(self: Any, request: Any) -> bool:
        if self.ppd_observer is not None:
            # All tokens but the last are in the KV cache, and what is in flight.
            kept = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, kept)
        return original(self, request)

    return _handle_stopped_request


def _with_all_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, "ppd", None) is None:
            original(self, speculative_config)

    return _validate_spec_decode


def _runs_ppd(vllm_config: Any) -> bool:
    # Only PPD's own configuration class has it.
    return getattr(vllm_config.speculative_config, "ppd", None) is not None


def apply_patches() -> None:
    """Patch what every process needs; safe to call again."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    wrap(EngineArgs, "create_speculative_config", _with_ppd_method)
    wrap(EngineArgs, "add_cli_args", _with_speculative_model_flag)
    wrap(EngineCore, "_initialize_kv_caches", _with_measured_profile)
    wrap(SamplingParams, "_validate_spec_decode", _with_all_parameters)
    wrap(Scheduler, "__init__", _with_controller)
    wrap(Scheduler, "_handle_stopped_request", _with_right_frontier)
    wrap(Scheduler, "update_from_output", _with_observation)
