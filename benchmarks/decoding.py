"""What vLLM's outputs say of decoding: acceptance length, speed, time of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

from vllm_ppd.cli.generation import Batch, Generation
from vllm_ppd.search.latency import LatencyCurve


def decode_counts(request: Generation, max_tokens: int, reach: int) -> tuple[int, int]:
    """Tokens and steps of a request that the end of its text could not cut short.

    reach: the most tokens a step can bring. The first step reads the prompt.
    """
    written = len(request.steps[0].ids)
    tokens = steps = 0
    for step in request.steps[1:]:
        if written + reach > max_tokens:
            break
        written += len(step.ids)
        tokens += len(step.ids)
        steps += 1
    return tokens, steps


def acceptance_length(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Tokens per step, and half its 95 % interval, of (tokens, steps) per request.

    The interval is of a ratio of means over requests. Raises ValueError without steps.
    """
    total = sum(steps for _, steps in counts)
    if not total:
        raise ValueError("no request made a decode step; raise the tokens per request")
    rate = sum(tokens for tokens, _ in counts) / total
    square = sum((tokens - rate * steps) ** 2 for tokens, steps in counts)
    few = len(counts) / max(1, len(counts) - 1)
    return rate, 1.96 * math.sqrt(few * square) / total


def decode_speed(request: Generation) -> float:
    """Tokens per second after the first step, which reads the prompt."""
    first = request.steps[0]
    seconds = request.seconds - first.at_s
    return (len(request.ids) - len(first.ids)) / seconds if seconds > 0 else 0.0


def step_seconds(batch: Batch) -> float:
    """Median seconds of a step in which every request of the batch takes part."""
    begun = max(request.steps[0].at_s for request in batch.requests)
    ended = min(request.steps[-1].at_s for request in batch.requests)
    times = sorted(
        {
            step.at_s
            for request in batch.requests
            for step in request.steps
            if begun <= step.at_s <= ended
        }
    )
    if len(times) < 2:
        raise ValueError("requests are too short to time a step; ask for more tokens")
    return median(after - before for before, after in pairwise(times))


def latency_curve(seconds: Mapping[int, float]) -> LatencyCurve:
    """From plain steps by rows. A step of more rows is never taken to be faster."""
    rows = sorted(seconds)
    so_far = [max(seconds[n] for n in rows if n <= count) for count in rows]
    return LatencyCurve(tuple(rows), tuple(so_far))


def decode_rate(batch: Batch) -> tuple[int, float]:
    """Tokens and seconds after the last request's first step, until one ends."""
    begun = max(request.steps[0].at_s for request in batch.requests)
    ended = min(request.steps[-1].at_s for request in batch.requests)
    tokens = sum(
        len(step.ids)
        for request in batch.requests
        for step in request.steps
        if begun < step.at_s <= ended
    )
    return tokens, ended - begun


def speed_of(batches: Sequence[Batch]) -> float:
    """Tokens per second of all requests that run together."""
    pairs = [decode_rate(each) for each in batches]
    return sum(tokens for tokens, _ in pairs) / sum(seconds for _, seconds in pairs)
