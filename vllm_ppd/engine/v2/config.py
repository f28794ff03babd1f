"""How PPD presents itself to vLLM where the V2 model runner is to run it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import vllm.config.vllm as vllm_config_module
import vllm.envs as envs
from vllm.config import CUDAGraphMode, SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON

from vllm_ppd.config import METHOD
from vllm_ppd.engine.v2.candidate_rate import count_candidates_only
from vllm_ppd.search.plan_choice import PlanSettings
from vllm_ppd.trees.menu import Tier, TreePlan

logger = init_logger("vllm.ppd")

WORKERS = {
    "cpu": "vllm_ppd.engine.v2.worker_cpu.PPDCPUWorkerV2",
    "cuda": "vllm_ppd.engine.worker_gpu.PPDWorker",
}


@config
class PPDSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative settings for the method "ppd", which its own list lacks.

    Any name that vLLM does not know keeps it on the V2 runner and takes no special
    case in its scheduler: so many drafts per step, some accepted, no drafter's KV.
    """

    method: str | None = METHOD  # type: ignore[assignment]
    plan: dict[str, Any] | None = None
    """The trees, as ``TreePlan.to_dict`` writes them: chosen once, so that all ranks
    grow the same ones, and no part of what keys compiled graphs."""
    measure: bool = False
    """This start has to measure the machine; decided once for the same reasons."""

    def __post_init__(self) -> None:
        # Where vLLM asks about a drafter, the target is the answer.
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A process that is sent these settings may be the one that schedules.
        self.__dict__.update(state)
        count_candidates_only()

    def use_ngram(self) -> bool:
        # Asked by vLLM's V2 runner alone: whether all token ids shall be in device
        # memory, where earlier matches are looked for, or in the host's.
        return self.plan is not None and TreePlan.from_dict(self.plan).num_classes > 1

    def __repr__(self) -> str:
        # vLLM logs its whole configuration; a plan is pages long.
        return f"SpeculativeConfig(method='ppd', drafts={self.num_speculative_tokens})"


def runs_on_v2(device_type: str) -> bool:
    """Whether vLLM will choose its V2 runner, before it has a whole configuration.

    The same rule as vLLM's: its environment variable, else V2 where there is Triton.
    """
    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    if chosen is not None:
        return bool(chosen)
    return device_type == "cuda" and HAS_TRITON


def present_to_v2(
    args: Any,
    settings: PlanSettings,
    choice: str,
    profile: Any,
    model: Any,
    parallel: Any,
) -> PPDSpeculativeConfig:
    """The speculative settings that select PPD on V2.

    Args:
        args: vLLM's EngineArgs; on a GPU their attention backend becomes PPD's.
        settings: what the trees are chosen by.
        choice: of the profile, "auto", "none" or a file.
        profile: the machine's LatencyProfile, or None for a typical one.
        model: the target's ModelConfig.
        parallel: the target's ParallelConfig; its worker class becomes PPD's.
    """
    plan, _ = settings.choose(profile)
    parallel.worker_cls = WORKERS[settings.device]
    if settings.device == "cuda":
        _prepare_cuda(args)
    allow_async_scheduling()
    count_candidates_only()
    return PPDSpeculativeConfig(
        # vLLM wants at least one, also for trees that are all roots.
        num_speculative_tokens=max(1, *(_rows(tier) - 1 for tier in plan.tiers)),
        num_speculative_tokens_per_batch_size=_schedule(plan, settings.max_requests),
        plan=plan.to_dict(),
        measure=(
            choice == "auto"
            and profile is None
            and settings.tree is None
            # Their steps wait for each other, and each would measure for itself.
            and parallel.data_parallel_size == 1
        ),
        target_model_config=model,
        target_parallel_config=parallel,
    )


def _prepare_cuda(args: Any) -> None:
    """Full graphs for batches of trees alone: in others the stock kernel runs too."""
    compilation = args.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        logger.info("PPD uses CUDA graphs FULL_AND_PIECEWISE instead of FULL")
    if args.attention_backend is None and args.attention_config.backend is None:
        args.attention_backend = "CUSTOM"


def _rows(tier: Tier) -> int:
    return max((policy.max_rows for policy in tier.policies), default=1)


def _schedule(plan: TreePlan, max_requests: int) -> list[tuple[int, int, int]] | None:
    """vLLM's own channel for trees by load: (from, to, rows besides the root).

    None for a single tier: without a schedule vLLM can pad first steps.
    """
    if len(plan.tiers) == 1:
        return None
    schedule, first = [], 1
    for tier in plan.tiers:
        last = min(tier.max_requests or max_requests, max_requests)
        if first <= last:
            schedule.append((first, last, _rows(tier) - 1))
        first = last + 1
    return schedule


def allow_async_scheduling() -> None:
    """Add "ppd" to the methods for which vLLM 0.32 schedules ahead of the device.

    vLLM 0.33 asks only for its V1 runner and does not need it. Idempotent.
    """
    known = get_args(vllm_config_module.NgramGPUTypes)
    if METHOD not in known:
        vllm_config_module.NgramGPUTypes = Literal[(*known, METHOD)]  # type: ignore


def is_v2_config(speculative: Any) -> bool:
    """Whether a worker's speculative settings were made for the V2 runner."""
    return isinstance(speculative, PPDSpeculativeConfig)
