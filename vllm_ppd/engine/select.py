"""From ``speculative_config`` to a vLLM configuration that runs PPD.

Runs in the front-end process, before the engine starts, so everything that can be
wrong with a user's choice is said here. What the workers need travels as JSON in
``additional_config["ppd"]``, vLLM's side channel for plugins, which is also part of
the hash that keys compiled graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm
import vllm.envs as envs
from huggingface_hub import snapshot_download
from vllm.config import SpeculativeConfig
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform

from vllm_ppd.config import PPDConfig, PPDConfigError
from vllm_ppd.engine.counters import publish_metrics
from vllm_ppd.engine.known_profile import known_profile, profile_key
from vllm_ppd.engine.refusals import refuse_unsupported
from vllm_ppd.engine.v2.config import present_to_v2, runs_on_v2
from vllm_ppd.engine.versions import require_supported_vllm
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint, FingerprintError
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.defaults import row_limit
from vllm_ppd.search.plan_choice import PlanSettings
from vllm_ppd.search.profile import LatencyProfile
from vllm_ppd.trees.bigram import SUCCESSOR_FILE, SuccessorTable
from vllm_ppd.trees.tree import MAX_ROWS

logger = init_logger("vllm.ppd")

KEY = "ppd"
PROPOSER = "vllm_ppd.engine.v1.served_trees.PPDProposer"
WORKERS = {
    "cpu": "vllm_ppd.engine.v1.worker.PPDCPUWorker",
    "cuda": "vllm_ppd.engine.worker_gpu.PPDWorker",
}


def speculative_dict(args: Any) -> dict[str, Any] | None:
    """The speculative settings in ``args`` (EngineArgs) if they select PPD."""
    given = dict(args.speculative_config or {})
    for flag, key, value in (
        ("--spec-method", "method", args.spec_method),
        ("--spec-model", "model", args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", args.spec_tokens),
    ):
        if value is None:
            continue
        if PPDConfig.selected_by({**given, key: value}) and key in given:
            raise PPDConfigError(
                f"{flag} and --speculative-config['{key}'] are both given; keep one"
            )
        given[key] = value
    return given if PPDConfig.selected_by(given) else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from starting threads, which would not survive a fork.

    On CUDA vLLM forks its engine from this process. A child of a process whose OpenMP
    threads exist waits for them for ever at its first parallel operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def create_ppd_config(
    args: Any, speculative: dict[str, Any], model: Any, parallel: Any
) -> SpeculativeConfig:
    """Check everything and return the configuration that vLLM carries.

    Args:
        args: vLLM's EngineArgs; its ``additional_config`` gets PPD's settings.
        speculative: what the user wrote.
        model: the target's ModelConfig.
        parallel: the target's ParallelConfig; its worker class becomes PPD's.

    Raises:
        ValueError: one sentence naming what is wrong and what to do.
    """
    require_supported_vllm(vllm.__version__)
    config = PPDConfig.from_speculative(speculative)
    device = current_platform.device_type
    if device not in WORKERS:
        raise PPDConfigError(
            f"speculative method 'ppd' runs on CPU and CUDA, not on {device!r}"
        )
    if device == "cpu" and current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        # vLLM packs its KV cache differently elsewhere (NEON, RVV, VSX).
        raise PPDConfigError(
            "speculative method 'ppd' runs on x86-64 CPUs only, and this is "
            f"{current_platform.get_cpu_architecture().name}: serve without PPD"
        )
    refuse_unsupported(args, model, parallel)
    folder = resolve_path(config.path)
    prompts = PromptTokens.load(folder)
    prompts.check_against(_fingerprint(model))
    settings = _plan_settings(config, folder, prompts, device, args, model)
    on_v2 = runs_on_v2(device)
    if on_v2:
        # There all requests have as many rows, and nobody compares speeds.
        settings = replace(settings, measured=False, fixed_rows=True)
    key = profile_key(args, model, parallel, device, on_v2)
    profile = known_profile(config.profile, key)
    args.additional_config = {
        **(args.additional_config or {}),
        KEY: {
            "plan": settings.to_dict(),
            "profile": config.profile,
            "online": config.online,
            "learn_successors": config.conditioned and config.online,
            "profile_key": key,
            "vocab_size": model.get_vocab_size(),
            # Part of the compiled graph: the shape of the soft-token table.
            "soft_tokens": prompts.num_prompt_tokens * prompts.num_ept,
        },
    }
    publish_metrics()
    if on_v2:
        speculating = present_to_v2(
            args, settings, config.profile, profile, model, parallel
        )
    else:
        speculating = _present_to_v1(args, config, settings, profile, model, parallel)
    logger.info(
        "Parallel Prompt Decoding: %d prompt tokens from %s, up to %d rows per "
        "request and step",
        prompts.num_prompt_tokens,
        folder,
        speculating.num_speculative_tokens + 1,
    )
    return speculating


def _present_to_v1(
    args: Any,
    config: PPDConfig,
    settings: PlanSettings,
    profile: LatencyProfile | None,
    model: Any,
    parallel: Any,
) -> SpeculativeConfig:
    """The speculative settings that select PPD on vLLM's V1 runner."""
    plan, _ = settings.choose(profile)
    # Any tree within the limit may become the best one later, unless all is settled.
    settled = config.tree is not None or not (config.online or profile is None)
    max_rows = plan.max_rows if settled else settings.max_rows
    parallel.worker_cls = WORKERS[settings.device]
    if settings.device == "cuda":
        _prepare_cuda(args)
    elif _runs_in_processes(parallel):
        from vllm_ppd.engine.v1.executor import PPDMultiprocExecutor

        parallel.distributed_executor_backend = PPDMultiprocExecutor
    # custom_class keeps vLLM on the V1 runner, which this adapter subclasses, and
    # needs no new value in vLLM's closed list of methods.
    return SpeculativeConfig(
        method="custom_class",
        model=PROPOSER,
        # vLLM wants at least one, also for trees that are all roots.
        num_speculative_tokens=max(1, max_rows - 1),
        target_model_config=model,
        target_parallel_config=parallel,
    )


def _fingerprint(model: Any) -> BaseModelFingerprint:
    """The target's fingerprint: from its files where they are at hand."""
    text = model.hf_text_config
    architectures = getattr(model.hf_config, "architectures", None) or ["unknown"]
    try:
        return BaseModelFingerprint.of_folder(_resolve_local(model), name=model.model)
    except (FingerprintError, ValueError) as error:
        logger.warning(
            "the base model's embedding could not be compared with the one the "
            "prompt tokens were trained for (%s)",
            error,
        )
    return BaseModelFingerprint(
        name=model.model,
        revision=model.revision,
        architecture=architectures[0],
        hidden_size=model.get_hidden_size(),
        vocab_size=text.vocab_size,
        embedding_sha256=None,
    )


def _resolve_local(model: Any) -> str:
    """The target's folder: its path, or its snapshot in the hub's local cache."""
    if Path(model.model).is_dir():
        return str(model.model)
    try:
        return snapshot_download(
            model.model, revision=model.revision, local_files_only=True
        )
    except Exception as error:
        raise FingerprintError(f"no local copy of {model.model}") from error


def _plan_settings(
    config: PPDConfig,
    folder: Path,
    prompts: PromptTokens,
    device: str,
    args: Any,
    model: Any,
) -> PlanSettings:
    m, e = prompts.num_prompt_tokens, prompts.num_ept
    conditioned = config.conditioned and (folder / SUCCESSOR_FILE).exists()
    if conditioned:
        # A damaged table is said here, not in a worker.
        SuccessorTable.load(folder / SUCCESSOR_FILE, model.get_vocab_size(), m)
    rows = row_limit(device, e, config.num_speculative_tokens)
    if config.tree is not None and config.num_speculative_tokens is None:
        rows = MAX_ROWS
    return PlanSettings(
        path=str(folder.resolve()),
        num_prompt_tokens=m,
        num_ept=e,
        device=device,
        max_rows=rows,
        max_requests=args.max_num_seqs or 128,
        max_context=model.max_model_len,
        tree=config.tree and str(Path(config.tree).resolve()),
        conditioned=conditioned,
        suffix=config.suffix,
        measured=config.online and args.tensor_parallel_size == 1,
    )


def _runs_in_processes(parallel: Any) -> bool:
    """Whether vLLM will run its workers on a CPU by the multiprocess executor."""
    backend = parallel.distributed_executor_backend
    return backend == "mp" or (
        backend in (None, "uni") and envs.VLLM_ENABLE_V1_MULTIPROCESSING
    )


def _prepare_cuda(args: Any) -> None:
    """Tree attention in torch reads host-side plans, so no full CUDA graphs yet."""
    from vllm.config import CUDAGraphMode

    mode = args.compilation_config.cudagraph_mode
    if mode not in (None, CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
        logger.info("PPD uses piecewise CUDA graphs instead of %s", mode)
    if mode != CUDAGraphMode.NONE:
        args.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if args.attention_backend is None and args.attention_config.backend is None:
        args.attention_backend = "CUSTOM"
