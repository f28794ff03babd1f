"""Once per machine and model: measure steps, file the profile, plan by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_ppd.engine.v1.measure import measure_profile
from vllm_ppd.search.plan_search import PlannedTier
from vllm_ppd.search.latency import LatencyProfile, cache_file

__all__ = ["log_tiers", "measure_and_file", "plan_for_this_machine"]

logger = init_logger("vllm.ppd")


def plan_for_this_machine(runner: Any) -> None:
    """Measure if this start has to, and serve the best plan for what was found."""
    drafter = runner.drafter
    if not drafter.wants_profile:
        return
    profile = measure_and_file(
        lambda quiet: measure_profile(
            runner, drafter.num_rows, drafter.profile_key, quiet
        )
    )
    plan, tiers = drafter.plan_settings.choose(profile)
    drafter.set_plan(plan)
    drafter.profile = profile
    drafter.wants_profile = False
    if get_tp_group().is_first_rank:
        log_tiers(tiers)


def measure_and_file(
    measure: Callable[[bool], LatencyProfile], note: str = ""
) -> LatencyProfile:
    """Measure and keep the profile in the user's cache.

    All ranks of a tensor-parallel group take part, and all go by rank 0's figures.

    Args:
        measure: does it; told whether to be quiet.
        note: what to say besides.
    """
    group = get_tp_group()
    begun = time.monotonic()
    profile = measure(not group.is_first_rank)
    if group.world_size > 1:
        table = group.broadcast_object(profile.to_dict(), src=0)
        profile = LatencyProfile.from_dict(table)
    if not group.is_first_rank:
        return profile
    path = cache_file(profile.key)
    try:
        profile.save(path)
    except OSError as error:
        logger.warning("the latency profile could not be kept: %s", error)
    logger.info(
        "PPD measured this machine in %.1f s (kept in %s)%s",
        time.monotonic() - begun,
        path,
        note,
    )
    return profile


def log_tiers(tiers: list[PlannedTier]) -> None:
    """One line per tier of load: what is expected of its trees."""
    for tier in tiers:
        where = f" with contexts about {tier.context}" if tier.context > 1 else ""
        if tier.speculates:
            logger.info(
                "PPD up to %d requests%s: %.2f tokens per step with %.1f rows, "
                "expected %.2fx plain decoding",
                tier.requests,
                where,
                tier.found.tau,
                tier.found.mean_rows,
                tier.gain,
            )
        else:
            logger.info(
                "PPD from %d requests on%s: plain decoding", tier.requests, where
            )
