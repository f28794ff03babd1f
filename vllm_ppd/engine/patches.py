"""The ledger of everything in vLLM that this plugin replaces.

Each entry says what is patched, why no official seam serves, since which vLLM it is
known to fit, and how to notice that vLLM moved (tests/engine/test_patches.py checks
every entry against the installed version). What is *overridden in subclasses* is
listed too, because a renamed method fails as silently as a moved function. 0.32 was
run on CPU; so were the Python files of 0.33, which has no CPU wheel, with the compiled
kernels of 0.32 (docs/versions.md).

Patched:
- ``EngineArgs.create_speculative_config``: vLLM's ``SpeculativeConfig.method`` is a
  closed list, and its ``custom_class`` method knows no settings. The wrapper handles
  PPD and calls the original for everything else. 0.32, 0.33.
- ``EngineArgs.add_cli_args``: adds ``--speculative-model``, another spelling of
  vLLM's own ``--spec-model``. 0.32, 0.33.
- attention backends ``CPU_ATTN`` and ``CUSTOM`` (in workers that run PPD only, through
  vLLM's ``register_backend``): tree rows need their own mask. 0.32, 0.33.
- ``vllm.v1.worker.cpu_worker.CPUModelRunner`` (while PPD's worker builds its runner):
  the CPU worker names the class inline, without the GPU worker's
  ``_make_model_runner`` seam. 0.32, 0.33.
- on V2, ``vllm.v1.worker.gpu.model_runner.init_speculator`` and
  ``vllm.v1.worker.cpu.model_runner.CPUModelRunner`` (while a runner is built): both are
  looked up by name, with no method to override. 0.32, 0.33.
- on V2, ``vllm.config.vllm.NgramGPUTypes``: the methods for which vLLM schedules ahead
  of the device are a closed list. 0.32.
- on V2, ``vllm.v1.worker.gpu.model_runner.ModelCudaGraphManager`` (while a runner lists
  its CUDA graphs): its ``_init_candidates`` finds no full graph for many of the loads
  that have several row counts between them (v2/graphs.py). 0.32, 0.33.
- ``Scheduler.update_from_output`` (in processes that are sent PPD's settings for V2):
  hands vLLM the number of drafts that are no candidates; the scheduler is built inside
  the engine, and a scheduler class of one's own changes how vLLM schedules. 0.32, 0.33.

Subclassed: ``CPUWorker`` (init_device, compile_or_warm_up_model, execute_model,
sample_tokens), ``MultiprocExecutor`` (execute_model, sample_tokens,
take_draft_token_ids), ``Worker`` (_make_model_runner, compile_or_warm_up_model), the V1
model runners (see runner_v1.OVERRIDDEN; for steps without guesses their
``speculative_config`` is None), ``CPUAttentionBackend`` and
``FlashAttentionBackend`` with their builders (build) and implementations (forward),
``VocabParallelEmbedding`` (forward). On V2 also ``SpeculativeConfig`` (use_ngram, which
vLLM asks for where token ids shall lie), the V2 model runners and model states (see
v2/runner.py and v2/model_state.py, OVERRIDDEN).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import Any

# Marks a function that already is our wrapper, so that patching twice is harmless.
_MARK = "_vllm_ppd_original"


def wrap(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(current)`` in the place of a method, once."""
    current = getattr(owner, name)
    if hasattr(current, _MARK):
        return
    wrapper = make(current)
    setattr(wrapper, _MARK, current)
    is_static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)


def _with_ppd_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
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
    @functools.wraps(original)
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
                "Prompt Decoding): 'ppd:' and a folder or hub id. Another name of "
                "--spec-model.",
            )
        return parser

    return add_cli_args


def apply_patches() -> None:
    """Patch what every process needs; safe to call again."""
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "create_speculative_config", _with_ppd_method)
    wrap(EngineArgs, "add_cli_args", _with_speculative_model_flag)
