"""The draft length controller at vLLM's scheduler, in the engine-core process.

vLLM's scheduler looks the number of draft tokens of the next step up by the number of
running requests, and sends it to every rank with the step. PPD's controller is that
look-up table: it sees each step's tokens and time, and rewrites the table in place.
So V1, V2 and tensor-parallel ranks follow one decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_ppd.adaptive.draft_length import DraftLengthController, load_buckets
from vllm_ppd.engine.settings import ServingSettings, serving_settings
from vllm_ppd.search.menu_search import prior_lengths, step_ratios

logger = init_logger("vllm.ppd")

# Attribute of a worker's output: draft tokens among the scheduled rows, per request.
_DRAFT_COUNTS = "ppd_draft_counts"


def make_controller(
    settings: ServingSettings, max_num_running: int, uniform: bool
) -> DraftLengthController:
    """The controller of an engine.

    Draft lengths start where the machine's profile puts them. Without a profile every
    load starts with plain decoding, or, if nothing may be adapted, with the menu's
    largest entry.

    Args:
        settings: of the engine.
        max_num_running: most requests that run at once.
        uniform: one draft length for all loads.
    """
    menu = settings.tree_menu()
    lengths = list(menu.draft_lengths)
    buckets = load_buckets(max_num_running)
    profile = settings.latency_profile()
    if uniform:
        # One length for all loads: the one that the largest load can bear.
        buckets = buckets[-1:]
    prior = ratios = plain = None
    acceptance = [entry.acceptance_length for entry in menu.entries]
    if profile is not None:
        prior = prior_lengths(menu, profile, buckets)
        ratios = step_ratios(menu, profile, buckets)
        loads = range(max_num_running + 1)
        plain = [profile.curve(max(load, 1))(1) for load in loads]
    elif not settings.adapts:
        prior = [lengths[-1]] * len(buckets)
    return DraftLengthController(
        lengths,
        max_num_running,
        prior,
        acceptance,
        ratios,
        plain,
        uniform=uniform,
        adapts=settings.adapts,
    )


class StepObserver:
    """Tells a controller what each decode step of a scheduler took and emitted.

    Args:
        controller: of the scheduler.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        controller: DraftLengthController,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.controller = controller
        self._clock = clock
        # End of the last step; None after a pause.
        self._ended: float | None = None
        # Draft length for which the drafts of the next step are made.
        self._draft_length = 0

    def before_update(self, scheduled: Any, output: Any) -> None:
        """Note a step whose output has arrived.

        Args:
            scheduled: vLLM's SchedulerOutput.
            output: the workers' ModelRunnerOutput for it.
        """
        now, began, draft_length = self._clock(), self._ended, self._draft_length
        self._ended, self._draft_length = now, scheduled.num_spec_tokens_to_schedule
        drafts = scheduled.scheduled_spec_decode_tokens
        counts = getattr(output, _DRAFT_COUNTS, None)
        if counts is not None:
            scheduled.num_invalid_spec_tokens = num_other_rows(
                drafts,
                dict(zip(output.req_ids, counts.tolist(), strict=True)),
                scheduled.num_invalid_spec_tokens or {},
            )
        rows = scheduled.num_scheduled_tokens
        if began is None or not rows:
            return
        num_tokens = sum(map(len, output.sampled_token_ids))
        reading = {request.req_id for request in scheduled.scheduled_new_reqs}
        decoding_rows = len(rows) + sum(map(len, drafts.values()))
        if reading or scheduled.total_num_scheduled_tokens != decoding_rows:
            reading |= {
                name for name in rows if rows[name] > 1 + len(drafts.get(name, ()))
            }
            for name, tokens in zip(
                output.req_ids, output.sampled_token_ids, strict=False
            ):
                num_tokens -= len(tokens) * (name in reading)
        self.controller.observe(
            len(rows),
            draft_length,
            num_tokens,
            now - began,
            len(reading),
            sum(rows[name] for name in reading),
        )
        for change in self.controller.take_changes():
            logger.info("PPD: %s", change)

    def after_update(self, busy: bool) -> None:
        """busy: requests remain, so that the next step follows at once."""
        if not busy:
            self._ended = None


def fetch_profile(vllm_config: Any, executor: Any) -> None:
    """Ask the workers, which have warmed up, for the profile that they measured."""
    if serving_settings(vllm_config).measure:
        profiles = executor.collective_rpc("ppd_profile")
        vllm_config.speculative_config.ppd["profile"] = profiles[0]


def attach_controller(scheduler: Any) -> None:
    """Make a controller's schedule the scheduler's look-up table."""
    config = scheduler.vllm_config
    controller = make_controller(
        serving_settings(config),
        scheduler.scheduler_config.max_num_seqs,
        uniform=config.parallel_config.data_parallel_size > 1,
    )
    scheduler.dynamic_sd_lookup = controller.schedule
    scheduler.ppd_observer = StepObserver(controller)


def attach_draft_counts(output: Any, counts: Any) -> None:
    """Send int [B] draft tokens along with a step's AsyncOutput (in the worker).

    On V2 only the device knows which scheduled rows are draft tokens and which are
    prompt rows or padding. The counts need not have arrived yet; they arrive before
    what the output itself waits for.
    """
    setattr(output.model_runner_output, _DRAFT_COUNTS, counts)


def num_other_rows(
    scheduled: dict[str, list[int]], counts: dict[str, int], invalid: dict[str, int]
) -> dict[str, int]:
    """Scheduled rows of each request that are no draft tokens.

    vLLM leaves this many out of its acceptance rate.

    Args:
        scheduled: rows besides the root, of each request.
        counts: draft tokens of each request of the step.
        invalid: draft tokens that vLLM itself ruled out, by a grammar.
    """
    return {
        request_id: max(
            len(rows) - counts.get(request_id, 0), invalid.get(request_id, 0)
        )
        for request_id, rows in scheduled.items()
    }
