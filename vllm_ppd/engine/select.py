"""From ``speculative_config`` to a vLLM configuration that runs PPD.

Runs in the front-end process, before the engine starts, so everything that can be
wrong with a user's choice is said here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import vllm
import vllm.config.vllm as vllm_config_module
import vllm.envs as envs
from huggingface_hub import snapshot_download
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_ppd.config import PPDConfig, PPDConfigError
from vllm_ppd.engine.counters import publish_metrics
from vllm_ppd.engine.measure import known_profile, profile_key
from vllm_ppd.engine.refusals import refuse_unsupported, require_supported_vllm
from vllm_ppd.engine.settings import KEY, PPDSpeculativeConfig, ServingSettings
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens, trained_for
from vllm_ppd.search.menu_search import menu_for
from vllm_ppd.trees.bigram import BIGRAM_FILE, BigramTable

logger = init_logger("vllm.ppd")

PROPOSER = "vllm_ppd.engine.v1.served_trees.PPDProposer"
V1_WORKER = "vllm_ppd.engine.workers.PPDCPUWorker"
V2_WORKERS = {
    "cpu": "vllm_ppd.engine.workers.PPDCPUWorkerV2",
    "cuda": "vllm_ppd.engine.workers.PPDWorker",
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
) -> PPDSpeculativeConfig:
    """Check everything and return the configuration that vLLM carries.

    Args:
        args: vLLM's EngineArgs; its ``additional_config`` gets what keys graphs.
        speculative: what the user wrote.
        model: the target's ModelConfig.
        parallel: the target's ParallelConfig; its worker class becomes PPD's.

    Raises:
        ValueError: one sentence naming what is wrong and what to do.
    """
    require_supported_vllm(vllm.__version__)
    config = PPDConfig.from_speculative(speculative)
    device = current_platform.device_type
    if device not in V2_WORKERS:
        raise PPDConfigError(
            f"speculative method 'ppd' runs on CPU and CUDA, not on {device!r}"
        )
    if device == "cpu" and current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        # vLLM packs its KV cache differently elsewhere (NEON, RVV, VSX).
        raise PPDConfigError(
            "speculative method 'ppd' runs on x86-64 CPUs only, and this is "
            f"{current_platform.get_cpu_architecture().name}: serve without PPD"
        )
    on_v2 = runs_on_v2(device)
    if device == "cuda" and not on_v2:
        raise PPDConfigError(
            "speculative method 'ppd' needs vLLM's V2 model runner on CUDA, and "
            "VLLM_USE_V2_MODEL_RUNNER=0 or a missing Triton selects V1: unset the "
            "variable and install triton"
        )
    refuse_unsupported(args, model, parallel, on_v2)
    settings = _serving_settings(config, args, model, parallel, device, on_v2)
    parallel.worker_cls = V2_WORKERS[device] if on_v2 else V1_WORKER
    args.additional_config = {
        **(args.additional_config or {}),
        # Part of the compiled graph: the shape of the soft-token table.
        KEY: {"soft_tokens": settings.num_prompt_tokens * settings.num_ept},
    }
    publish_metrics()
    if on_v2:
        _prepare_v2(args, device)
    elif parallel.distributed_executor_backend == "mp" or (
        parallel.distributed_executor_backend in (None, "uni")
        and envs.VLLM_ENABLE_V1_MULTIPROCESSING
    ):
        # vLLM will run its workers on a CPU in processes of their own.
        from vllm_ppd.engine.v1.executor import PPDMultiprocExecutor

        parallel.distributed_executor_backend = PPDMultiprocExecutor
    max_rows = settings.tree_menu().max_rows
    sources = f"{settings.num_prompt_tokens} prompt tokens from {settings.path}"
    if settings.path is None:
        learnt = ["bigrams that it learns"] * settings.learns_bigram
        others = " and ".join(learnt + ["n-gram matches"] * settings.ngram)
        train = f"vllm-ppd train --model {model.model}"
        sources = f"{others}, without prompt tokens (to make some: {train})"
    logger.info(
        "Parallel Prompt Decoding: drafts from %s, up to %d rows per request and step",
        sources,
        max_rows,
    )
    return PPDSpeculativeConfig(
        # custom_class keeps vLLM on the V1 runner, which this adapter subclasses.
        method=KEY if on_v2 else "custom_class",
        model=(settings.path or model.model) if on_v2 else PROPOSER,
        # vLLM refuses 0.
        num_speculative_tokens=max(1, max_rows - 1),
        ppd=settings.to_dict(),
        target_model_config=model,
        target_parallel_config=parallel,
    )


def _serving_settings(
    config: PPDConfig, args: Any, model: Any, parallel: Any, device: str, on_v2: bool
) -> ServingSettings:
    base, m, e = _fingerprint(model), 0, 1
    folder = resolve_path(config.path) if config.path else trained_for(base)
    vocab_size, bigram = model.get_vocab_size(), False
    learns = config.bigram and config.online
    if folder is not None:
        prompts = PromptTokens.load(folder)
        if warning := prompts.check_against(base):
            logger.warning("%s", warning)
        m, e = prompts.num_prompt_tokens, prompts.num_ept
        bigram = config.bigram and (folder / BIGRAM_FILE).exists()
        if bigram:
            # A damaged table is said here, not in a worker.
            BigramTable.load(folder / BIGRAM_FILE, vocab_size, m)
    menu = menu_for(
        folder,
        m,
        e,
        bigram=bigram or learns,
        ngram=config.ngram,
        max_rows=config.max_rows(device, e),
        fixed_rows=on_v2,
        tree_file=config.tree,
    )
    key = profile_key(args, model, parallel, device, on_v2)
    profile = known_profile(config.profile, key)
    return ServingSettings(
        path=None if folder is None else str(folder.resolve()),
        num_prompt_tokens=m,
        num_ept=e,
        vocab_size=vocab_size,
        device=device,
        menu=menu.to_dict(),
        bigram=bigram,
        learns_bigram=learns,
        ngram=config.ngram and menu.num_classes > 1,
        adapts=config.online,
        profile=None if profile is None else profile.to_dict(),
        measure=config.profile in ("auto", "measure") and profile is None,
        measure_seconds=config.measure_seconds,
        profile_key=key,
    )


def runs_on_v2(device_type: str) -> bool:
    """Whether vLLM will choose its V2 runner, before it has a whole configuration.

    The same rule as vLLM's: its environment variable, else V2 where there is Triton.
    """
    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    if chosen is not None:
        return bool(chosen)
    return device_type == "cuda" and HAS_TRITON


def _prepare_v2(args: Any, device: str) -> None:
    """Async scheduling, and on a GPU full graphs for batches of trees alone: in other
    batches the stock kernel runs too."""
    known_methods = get_args(vllm_config_module.NgramGPUTypes)
    if KEY not in known_methods:
        # vLLM 0.32 schedules ahead of the device for a closed list of methods; 0.33
        # asks only for its V1 runner.
        vllm_config_module.NgramGPUTypes = Literal[(*known_methods, KEY)]  # type: ignore
    if device != "cuda":
        return
    compilation = args.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        logger.info("PPD uses CUDA graphs FULL_AND_PIECEWISE instead of FULL")
    # Whatever else was chosen is refused.
    if args.attention_config.backend is None:
        args.attention_backend = "CUSTOM"


def _fingerprint(model: Any) -> BaseModelFingerprint:
    """The target's fingerprint: from its files where they are at hand."""
    text = model.hf_text_config
    architectures = getattr(model.hf_config, "architectures", None) or ["unknown"]
    try:
        folder = model.model
        if not Path(folder).is_dir():
            folder = snapshot_download(
                folder, revision=model.revision, local_files_only=True
            )
        return BaseModelFingerprint.of_folder(folder, name=model.model)
    # huggingface_hub raises many unrelated types.
    except Exception as error:
        logger.warning(
            "the base model's embedding could not be compared with the one that "
            "prompt tokens were trained for (%s)",
            error,
        )
    return BaseModelFingerprint(
        name=model.model,
        revision=model.revision,
        architecture=architectures[0],
        hidden_size=model.get_hidden_size(),
        vocab_size=text.vocab_size,
        embedding_signs=None,
    )
