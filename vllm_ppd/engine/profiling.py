"""Once per machine and model: measure steps, file the profile, plan by it."""

from __future__ import annotations

import time
from typing import Any

from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_ppd.engine.measure_steps import measure_profile
from vllm_ppd.plan_search import PlannedTier
from vllm_ppd.profile import LatencyProfile, cache_file

__all__ = ["plan_for_this_machine"]

logger = init_logger("vllm.ppd")


def plan_for_this_machine(runner: Any) -> None:
    """Measure if this start has to, and serve the best plan for what was found.

    All ranks of a tensor-parallel group take part, and all go by rank 0's figures.
    """
    drafter = runner.drafter
    if not drafter.wants_profile:
        return
    group = get_tp_group()
    begun = time.monotonic()
    profile = measure_profile(
        runner, drafter.num_rows, drafter.profile_key, quiet=not group.is_first_rank
    )
    if group.world_size > 1:
        table = group.broadcast_object(profile.to_dict(), src=0)
        profile = LatencyProfile.from_dict(table)
    plan, tiers = drafter.plan_settings.choose(profile)
    drafter.set_plan(plan)
    drafter.profile = profile
    drafter.wants_profile = False
    if not group.is_first_rank:
        return
    path = cache_file(drafter.profile_key)
    try:
        profile.save(path)
    except OSError as error:
        logger.warning("the latency profile could not be kept: %s", error)
    logger.info(
        "PPD measured this machine in %.1f s (kept in %s)",
        time.monotonic() - begun,
        path,
    )
    log_tiers(tiers)


def log_tiers(tiers: list[PlannedTier]) -> None:
    """One line per tier of load: what is expected of its trees."""
    for tier in tiers:
        if tier.speculates:
            logger.info(
                "PPD up to %d requests: %.2f tokens per step with %.1f rows, expected "
                "%.2fx plain decoding",
                tier.requests,
                tier.found.tau,
                tier.found.mean_rows,
                tier.gain,
            )
        else:
            logger.info("PPD from %d requests on: plain decoding", tier.requests)
