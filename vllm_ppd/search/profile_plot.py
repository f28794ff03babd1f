"""A latency profile as a picture."""

from __future__ import annotations

import io

from vllm_ppd.search.profile import LatencyProfile

__all__ = ["draw_profile"]


def draw_profile(profile: LatencyProfile, suffix: str = "png") -> bytes:
    """Milliseconds of a step by rows, and relative to a plain one; a line per load.

    suffix: png, svg or pdf. Raises ImportError without matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = colormaps["viridis"]
    for index, (load, seconds) in enumerate(
        zip(profile.requests, profile.seconds, strict=True)
    ):
        colour = shades(0.9 * index / max(1, len(profile.requests) - 1))
        label = f"{load} request{'s' * (load > 1)}"
        times = [1000 * each for each in seconds]
        left.plot(profile.rows, times, ".-", color=colour, label=label)
        relative = [each / seconds[0] for each in seconds]
        right.plot(profile.rows, relative, ".-", color=colour, label=label)
    left.set(ylabel="ms per step", yscale="log")
    right.set(ylabel="time of a plain step at that load", ylim=(0, None))
    right.axhline(1, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("rows per request")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    key = profile.key
    parts = [key.get("device", "unknown machine"), key.get("dtype"), key.get("vllm")]
    title = ", ".join(str(part) for part in parts[:2] if part)
    figure.suptitle(title + (f", vLLM {parts[2]}" if parts[2] else ""), fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=120)
    return buffer.getvalue()
