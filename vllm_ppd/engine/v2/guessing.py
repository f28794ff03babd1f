"""How a request is guessed for: what it asks for, and what it needs."""

from __future__ import annotations

from enum import Enum
from typing import Any

from vllm_ppd.engine.opt_out import opts_out


class DraftMode(Enum):
    """See each value."""

    TREES = "trees"
    LINES = "lines"
    """Trees without siblings: see vllm_ppd.engine.v2.lines."""
    NOTHING = "nothing"
    """Rows are scheduled as for others, and all but the root are fillers."""

    @classmethod
    def of(cls, params: Any) -> DraftMode:
        """What vLLM's SamplingParams ask for, or need."""
        if opts_out(params.extra_args):
            return cls.NOTHING
        return cls.LINES if _needs_history(params) else cls.TREES


def _needs_history(params: Any) -> bool:
    """Whether a row's logits depend on the tokens before it."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or bool(params.bad_words)
        or params.structured_outputs is not None
        or getattr(params, "thinking_token_budget", None) is not None
    )
