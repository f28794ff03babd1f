"""vLLM's acceptance rate as one of candidates, where most drafts are other rows.

vLLM has a number for drafts that should not count, which its scheduler sets where a
grammar forbids some. Prompt rows and fillers are such drafts too, but on the V2 runner
only the device knows what each row is. So the worker sends the number of candidates
along with a step's output, and the scheduler infers the others from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_ppd.engine.patches import wrap

__all__ = ["attach_candidates", "count_candidates_only"]

_ATTRIBUTE = "ppd_candidates"


def attach_candidates(output: Any, candidates: np.ndarray) -> None:
    """Send int [B] candidates along with a step's AsyncOutput (in the worker).

    They need not be there yet, only before what the output itself waits for.
    """
    setattr(output.model_runner_output, _ATTRIBUTE, candidates)


def other_rows(
    scheduled: dict[str, list[int]], candidates: dict[str, int], known: dict[str, int]
) -> dict[str, int]:
    """For each request the scheduled drafts that are no candidates.

    Args:
        scheduled: drafts of each request.
        candidates: of each request of the step.
        known: drafts that vLLM has found to be none itself, by a grammar.
    """
    return {
        request_id: max(
            len(drafts) - candidates.get(request_id, 0), known.get(request_id, 0)
        )
        for request_id, drafts in scheduled.items()
    }


def _with_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        counts = getattr(model_runner_output, _ATTRIBUTE, None)
        if counts is not None:
            ids = model_runner_output.req_ids
            scheduler_output.num_invalid_spec_tokens = other_rows(
                scheduler_output.scheduled_spec_decode_tokens,
                dict(zip(ids, counts.tolist(), strict=True)),
                scheduler_output.num_invalid_spec_tokens or {},
            )
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


def count_candidates_only() -> None:
    """Patch the scheduler of this process; safe to call again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "update_from_output", _with_candidates)
