"""The draft length controller at vLLM's scheduler, in the engine-core process.

vLLM's scheduler looks the number of draft tokens of the next step up by the number of
running requests, and sends it to every rank with the step. PPD's controller is that
look-up table: it sees each step's tokens and time, and rewrites the table in place.
So V1, V2 and tensor-parallel ranks follow one decision.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_ppd.adaptive.draft_length import DraftLengthController, load_buckets
from vllm_ppd.engine.settings import ServingSettings, serving_settings
from vllm_ppd.search.menu_search import prior_lengths

__all__ = [
    "StepObserver",
    "attach_draft_counts",
    "num_other_rows",
    "with_controller",
    "with_measured_profile",
    "with_observation",
]

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
    prior = None
    if profile is not None:
        prior = prior_lengths(menu, profile, buckets)
        if uniform:
            # One length for all loads: the one that the largest load can bear.
            prior = [prior[-1]] * len(buckets)
    elif not settings.adapts:
        prior = [lengths[-1]] * len(buckets)
    return DraftLengthController(
        lengths, max_num_running, prior, uniform=uniform, adapts=settings.adapts
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

    def after_step(self, scheduled: Any, output: Any, busy: bool) -> None:
        """Note one step.

        Args:
            scheduled: vLLM's SchedulerOutput.
            output: the workers' ModelRunnerOutput for it.
            busy: requests remain, so that the next step follows at once.
        """
        now, began, draft_length = self._clock(), self._ended, self._draft_length
        self._ended = now if busy else None
        self._draft_length = scheduled.num_spec_tokens_to_schedule
        running = len(scheduled.num_scheduled_tokens)
        drafts = sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
        if (
            began is None
            or not running
            # Steps that read prompts take longer for reasons of their own.
            or scheduled.scheduled_new_reqs
            or scheduled.total_num_scheduled_tokens != running + drafts
        ):
            return
        num_tokens = sum(map(len, output.sampled_token_ids))
        self.controller.observe(running, draft_length, num_tokens, now - began)
        for change in self.controller.take_changes():
            logger.info("PPD: %s", change)


def with_measured_profile(original: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineCore._initialize_kv_caches`: workers have warmed up and measured; the
    scheduler is not built yet."""

    @functools.wraps(original)
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        kv_cache_config = original(self, vllm_config)
        settings = serving_settings(vllm_config)
        if settings is not None and settings.measure:
            profiles = self.model_executor.collective_rpc("ppd_profile")
            vllm_config.speculative_config.ppd["profile"] = profiles[0]
        return kv_cache_config

    return _initialize_kv_caches


def with_controller(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.__init__`: the controller's schedule becomes vLLM's look-up table."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.ppd_observer = None
        settings = serving_settings(self.vllm_config)
        if settings is None:
            return
        uniform = self.vllm_config.parallel_config.data_parallel_size > 1
        controller = make_controller(
            settings, self.scheduler_config.max_num_seqs, uniform
        )
        self.dynamic_sd_lookup = controller.schedule
        self.ppd_observer = StepObserver(controller)

    return __init__


def with_observation(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.update_from_output`: counts draft tokens only, then observes."""

    @functools.wraps(original)
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        observer = getattr(self, "ppd_observer", None)
        if observer is None:
            return original(self, scheduler_output, model_runner_output)
        counts = getattr(model_runner_output, _DRAFT_COUNTS, None)
        if counts is not None:
            request_ids = model_runner_output.req_ids
            scheduler_output.num_invalid_spec_tokens = num_other_rows(
                scheduler_output.scheduled_spec_decode_tokens,
                dict(zip(request_ids, counts.tolist(), strict=True)),
                scheduler_output.num_invalid_spec_tokens or {},
            )
        outputs = original(self, scheduler_output, model_runner_output)
        observer.after_step(scheduler_output, model_runner_output, bool(self.running))
        return outputs

    return update_from_output


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
