"""Runs decoders in turn on the same prompts, counted by the same counter.

Every decoder is a vLLM engine in a process of its own (`vllm_ppd.cli.engines`)
that sleeps while another is measured. Tokens are the token ids in vLLM's own outputs,
for all decoders alike; steps are the engine's steps that brought output.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stats import Sameness, summarise

from vllm_ppd.cli.demo_prompts import read_texts
from vllm_ppd.cli.engines import (
    EngineProcess,
    engine_processes,
    settle,
    start_all,
)
from vllm_ppd.cli.generation import Batch, Generation

# "fixed" is PPD that keeps to the trees it starts with.
DECODERS = ("plain", "ppd", "ngram", "fixed")
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}


# A text that gives several passages is cut into parts so many times as long.
PART = 10


class Decoder(Protocol):
    """What is measured; an EngineProcess, or a fake in tests."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: dict[str, Any],
        *,
        at_once: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Batch: ...


@dataclass(frozen=True)
class Cell:
    """One condition: what is held fixed while decoders alternate."""

    batch: int
    temperature: float


@dataclass
class Measured:
    """One decoder in one cell."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    texts: list[Generation] = field(default_factory=list)
    """Of the first round, request by request."""


def decoder_settings(
    name: str,
    base: Mapping[str, Any],
    prompt_tokens: str,
    ppd: Mapping[str, Any],
    ngram: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a decoder; raises ValueError for an unknown one."""
    if name == "plain":
        return dict(base)
    if name in ("ppd", "fixed"):
        speculative = {"method": "ppd", "model": prompt_tokens, **ppd}
        if name == "fixed":
            speculative["online"] = False
    elif name == "ngram":
        speculative = {**NGRAM, **ngram}
    else:
        raise ValueError(f"unknown decoder {name!r}; known: {', '.join(DECODERS)}")
    return {**base, "speculative_config": speculative}


@contextlib.contextmanager
def running(
    settings: Mapping[str, Mapping[str, Any]], in_process: bool, say: Any
) -> Iterator[dict[str, EngineProcess]]:
    """All engines, started one after the other; logs stay only if one fails."""
    with engine_processes(settings, "bench", in_process) as engines:
        start_all(list(engines.values()), say)
        yield engines


def pick_texts(path: Path, count: int, characters: int, seed: int = 0) -> list[str]:
    """Passages of `characters` from inside held-out texts, the same at every call.

    Passages begin at any line, as a file's start is often a licence. One per text;
    where that is not enough, one per part of `PART` times as many characters. Raises
    ValueError when there are too few of that length.
    """
    texts = list(read_texts(path))
    chosen = random.Random(seed)
    passages = [p for text in texts if (p := _passage(text, characters, chosen))]
    if len(passages) < count:
        size = PART * characters
        parts = [t[i : i + size] for t in texts for i in range(0, len(t), size)]
        passages = [p for part in parts if (p := _passage(part, characters, chosen))]
    if len(passages) < count:
        raise ValueError(
            f"{path} has {len(passages)} texts or parts of texts of {characters} "
            f"characters or more, and {count} are asked for; "
            "lower --num-prompts or --prompt-tokens"
        )
    return chosen.sample(passages, count)


def _passage(text: str, characters: int, chosen: random.Random) -> str | None:
    starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    starts = [start for start in starts if start + characters <= len(text)]
    if not starts:
        return None
    start = chosen.choice(starts)
    return text[start : start + characters]


def encode_prompts(
    engine: EngineProcess, path: Path, count: int, length: int
) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens from a file of held-out texts."""
    # Text has hardly ever more than eight characters per token.
    texts = pick_texts(path, count, 8 * length)
    prompts = [ids[:length] for ids in engine.encode(texts)]
    short = sum(len(ids) < length for ids in prompts)
    if short:
        raise ValueError(
            f"{short} of {count} passages of {path} have fewer than {length} tokens; "
            "lower --prompt-tokens"
        )
    return prompts


def text_lengths(count: int, tokens: int, spread: float, seed: int = 0) -> list[int]:
    """Tokens of `count` texts, drawn evenly from `tokens` less or more `spread` times
    as many, the same at every call."""
    least, most = round((1 - spread) * tokens), round((1 + spread) * tokens)
    chosen = random.Random(seed)
    return [chosen.randint(max(1, least), most) for _ in range(count)]


def figures(batches: Sequence[Batch]) -> dict[str, float]:
    """The figures of one round."""
    requests = [request for batch in batches for request in batch.requests]
    wall = sum(batch.wall_s for batch in batches)
    decoded = sum(len(r.ids) - len(r.steps[0].ids) for r in requests)
    decode_steps = sum(len(r.steps) - 1 for r in requests)
    # As a server under load sees it: the end, when ever fewer requests are running,
    # says more of how unequal texts are than of how fast they are written.
    full = [batch.full or (batch.wall_s, batch.tokens) for batch in batches]
    return {
        "tokens_per_s": sum(tokens for _, tokens in full) / sum(s for s, _ in full),
        "tokens_per_s_to_the_end": sum(batch.tokens for batch in batches) / wall,
        "wall_s": wall,
        "tokens": sum(batch.tokens for batch in batches),
        "engine_steps": sum(batch.engine_steps for batch in batches),
        # Acceptance length; a request's first step reads the prompt and is left out.
        "tokens_per_step": decoded / decode_steps if decode_steps else 1.0,
        "ms_per_step": 1000 * wall / max(1, sum(b.engine_steps for b in batches)),
        "first_token_s": sum(r.steps[0].at_s for r in requests) / len(requests),
    }


def run_prompts(
    engine: Decoder,
    prompts: Sequence[Sequence[int]],
    cell: Cell,
    lengths: Sequence[int],
) -> list[Batch]:
    """All prompts once, `cell.batch` in flight until none is left to start; every
    request to its full length."""
    params = {"temperature": cell.temperature, "ignore_eos": True}
    return [engine.generate(prompts, params, at_once=cell.batch, lengths=lengths)]


def measure_cell(
    engines: Mapping[str, Decoder],
    prompts: Sequence[Sequence[int]],
    cell: Cell,
    lengths: Sequence[int],
    rounds: int,
    pause: Any = settle,
) -> dict[str, Measured]:
    """Warm every decoder up, then measure them in alternation.

    lengths: tokens that are written for each prompt.
    pause: called before each turn, so that the engine that ran last is asleep.
    """
    found = {name: Measured() for name in engines}
    for engine in engines.values():
        pause()
        # A whole batch, so that nothing is compiled or allocated while measured.
        run_prompts(engine, prompts[: cell.batch], cell, lengths[: cell.batch])
    for number in range(rounds):
        for name, engine in engines.items():
            pause()
            batches = run_prompts(engine, prompts, cell, lengths)
            found[name].rounds.append(figures(batches))
            if number == 0:
                found[name].texts = [r for b in batches for r in b.requests]
    return found


def report(cell: Cell, starts: Sequence[Mapping[str, Measured]]) -> dict[str, Any]:
    """A cell's part of the results file.

    starts: what was measured each time that the engines were started.
    """
    by_start = [
        summarise({name: measured.rounds for name, measured in found.items()})
        for found in starts
    ]
    rounds = {
        name: [one for f in starts for one in f[name].rounds] for name in starts[0]
    }
    summary = summarise(rounds)
    decoders = {}
    found = starts[0]
    for name, measured in found.items():
        same = None
        # Sampled texts differ by chance, greedy ones must not.
        if cell.temperature == 0 and "plain" in found:
            plain_ids = [text.ids for text in found["plain"].texts]
            same = vars(Sameness.of([t.ids for t in measured.texts], plain_ids))
        repeated = [text.repeated for text in measured.texts]
        ratios = [
            one[name]["ratio"]["median"] for one in by_start if "ratio" in one[name]
        ]
        decoders[name] = {
            **summary[name],
            "ratio_by_start": ratios,
            "same_ids_as_plain": same,
            "repeated_4grams": round(sum(repeated) / len(repeated), 4),
            "rounds": [
                {key: round(value, 5) for key, value in one.items()}
                for one in rounds[name]
            ],
        }
    return {
        "batch": cell.batch,
        "temperature": cell.temperature,
        "decoders": decoders,
    }


def document(
    script: str,
    environment: Mapping[str, Any],
    engines: Mapping[str, Any],
    settings: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A results file."""
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": script,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": dict(environment),
        "engines": dict(engines),
        "settings": dict(settings),
        "cells": list(cells),
    }
