"""What a prompt's rows cost in steps that also decode."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["seconds_per_row"]


def seconds_per_row(
    prompt_rows: Sequence[int], seconds: Sequence[float]
) -> float | None:
    """Seconds that a row of a prompt adds to a step, at least 0.

    The median slope between two steps (Theil and Sen), because a step now and then
    waits for something else. Only pairs that are far apart count: where prompts are
    nearly equally long, the others would be noise.

    Args:
        prompt_rows: [N] of steps that are alike otherwise.
        seconds: [N] that they took.

    Returns:
        None if all have as many.
    """
    rows = np.array(prompt_rows, dtype=float)
    apart = rows[:, None] - rows
    widest = apart.max(initial=0.0)
    if widest == 0:
        return None
    times = np.array(seconds)
    pairs = apart >= widest / 2
    slopes = (times[:, None] - times)[pairs] / apart[pairs]
    return max(0.0, float(np.median(slopes)))
