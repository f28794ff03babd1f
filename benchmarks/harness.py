"""Decoders in turn on the same prompts, counted by the same counter.

Tokens are the token ids in vLLM's own outputs, for all decoders alike; steps are the
engine's steps that brought output.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from engines import Batch, settle
from results import sameness, summarise

from vllm_ppd.engine.generation import Generation
from vllm_ppd.train.documents import find_documents

# "fixed" is PPD that adapts nothing; "other" is the PPD of another checkout.
DECODERS = ("plain", "ppd", "ngram", "fixed", "other")
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}


@dataclass(frozen=True)
class Cell:
    """One condition: what is held fixed while decoders alternate."""

    batch: int
    temperature: float


@dataclass
class Measured:
    """One decoder in one cell."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    requests: list[Generation] = field(default_factory=list)
    """Of the first round."""


def decoder_settings(
    name: str,
    base: Mapping[str, Any],
    prompt_tokens: str,
    ppd: Mapping[str, Any],
    ngram: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a decoder, one of `DECODERS`."""
    if name == "plain":
        return dict(base)
    if name in ("ppd", "fixed", "other"):
        speculative = {"method": "ppd", "model": prompt_tokens}
        # Another checkout may have other keys.
        speculative.update({} if name == "other" else ppd)
        if name == "fixed":
            speculative["online"] = False
    else:
        speculative = {**NGRAM, **ngram}
    return {**base, "speculative_config": speculative}


def pick_texts(texts: Sequence[str], count: int, characters: int) -> list[str]:
    """`count` different passages of `characters` from texts, the same at every call.

    They begin at any line, as a file's start is often a licence; text by text, and
    again from the first text where there are too few. Raises ValueError where there
    are too few lines, too.
    """
    starts = [
        [i for i in range(len(t) - characters + 1) if i == 0 or t[i - 1] == "\n"]
        for t in texts
    ]
    if sum(map(len, starts)) < count:
        raise ValueError(
            f"the data has {sum(map(len, starts))} lines with {characters} characters "
            f"from there on, and {count} prompts are asked for; lower --num-prompts, "
            "--waves or --prompt-tokens"
        )
    chosen = random.Random(0)
    for each in starts:
        chosen.shuffle(each)
    passages = []
    while len(passages) < count:
        for text, each in zip(texts, starts, strict=True):
            if each:
                start = each.pop()
                passages.append(text[start : start + characters])
    return passages[:count]


def encode_prompts(tokenizer: Any, path: Path, count: int, length: int) -> list[Any]:
    """Token ids of `count` prompts: passages of `length` tokens, or whole prompts.

    Raises ValueError for too few or too short texts.
    """
    contents: list[Any] = [document.read() for document in find_documents(path)]
    texts = [c if isinstance(c, str) else c[0]["content"] for c in contents]
    if texts != contents:
        # Prompts are used as they are, again from the first if there are too few.
        return [tokenizer.encode(texts[i % len(texts)]) for i in range(count)]
    # Text has hardly ever more than eight characters per token.
    passages = pick_texts(texts, count, 8 * length)
    cut = [tokenizer.encode(passage)[:length] for passage in passages]
    short = sum(len(ids) < length for ids in cut)
    if short:
        raise ValueError(
            f"{short} of {count} passages of {path} have fewer than {length} tokens; "
            "lower --prompt-tokens"
        )
    return cut


def text_lengths(count: int, tokens: int, spread: float) -> list[int]:
    """Tokens of `count` texts, drawn evenly from `tokens` less or more `spread` times
    as many, the same at every call."""
    shortest, longest = round((1 - spread) * tokens), round((1 + spread) * tokens)
    chosen = random.Random(0)
    return [chosen.randint(max(1, shortest), longest) for _ in range(count)]


def figures(batch: Batch, menu: Sequence[Sequence[float]] | None) -> dict[str, float]:
    """The figures of one round.

    menu: [mean rows, expected acceptance length] of PPD's trees; without one nothing
        is promised.
    """
    requests = batch.requests
    decoded = sum(len(r.ids) - len(r.steps[0].ids) for r in requests)
    decode_steps = sum(len(r.steps) - 1 for r in requests)
    # As a server under load sees it: the end, when ever fewer requests are running,
    # says more of how unequal texts are than of how fast they are written.
    seconds, tokens = batch.full
    gaps = [
        later.at_s - earlier.at_s
        for request in requests
        for earlier, later in pairwise(request.steps)
    ]
    values = {
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_to_the_end": batch.tokens / batch.wall_s,
        "wall_s": batch.wall_s,
        "tokens": batch.tokens,
        "engine_steps": batch.engine_steps,
        # A request's first step reads the prompt and is left out.
        "acceptance_length": decoded / decode_steps if decode_steps else 1.0,
        # Of steps as a request sees them; those that read prompts are few.
        "ms_per_step": 1000 * median(gaps or [batch.wall_s]),
        "first_token_s": sum(r.steps[0].at_s for r in requests) / len(requests),
    }
    counted = batch.counters.get("request_steps", 0.0)
    if menu and counted:
        values["rows"] = batch.counters["rows"] / counted
        # Between two entries, and before the first, steps are a mixture.
        points = zip(*sorted([(1.0, 1.0), *map(tuple, menu)]), strict=True)
        values["promised_length"] = float(np.interp(values["rows"], *points))
    return values


def measure_cell(
    engines: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    cell: Cell,
    lengths: Sequence[int],
    rounds: int,
    menus: Mapping[str, Any] | None = None,
    pause: Any = settle,
) -> dict[str, Measured]:
    """Warm every decoder up, then measure them in alternation.

    Args:
        engines: by decoder.
        prompts: token ids; `cell.batch` requests are in flight until none is left.
        cell: the condition.
        lengths: tokens to write for each prompt; end of text is ignored.
        rounds: turns of each decoder.
        menus: the engines' tree menus, see `figures`.
        pause: called before each turn, so that the engine that ran last is asleep.
    """
    measured = {name: Measured() for name in engines}
    params = {"temperature": cell.temperature, "ignore_eos": True}
    for number in range(rounds + 1):
        # First a whole batch, so that nothing is compiled or allocated while measured.
        count = len(prompts) if number else cell.batch
        for name, engine in engines.items():
            pause()
            batch = engine.generate(
                prompts[:count], params, at_once=cell.batch, lengths=lengths[:count]
            )
            if number:
                menu = (menus or {}).get(name)
                measured[name].rounds.append(figures(batch, menu))
            if number == 1:
                measured[name].requests = list(batch.requests)
    return measured


def report_cell(cell: Cell, starts: Sequence[Mapping[str, Measured]]) -> dict[str, Any]:
    """A cell's part of the results file.

    starts: what was measured each time that the engines were started.
    """
    rounds = {
        name: [one for start in starts for one in start[name].rounds]
        for name in starts[0]
    }
    summary = summarise(rounds)
    first = starts[0]
    decoders = {}
    for name, measured in first.items():
        same = None
        # Sampled texts differ by chance, greedy ones must not.
        if cell.temperature == 0 and "plain" in first:
            plain_ids = [request.ids for request in first["plain"].requests]
            ours = [request.ids for request in measured.requests]
            same = sameness(ours, plain_ids)
        repeated = [request.repeated for request in measured.requests]
        decoders[name] = {
            **summary[name],
            "same_ids_as_plain": same,
            "repeated_4grams": round(sum(repeated) / len(repeated), 4),
            "rounds": [
                {key: round(value, 5) for key, value in one.items()}
                for one in rounds[name]
            ],
        }
    return {"batch": cell.batch, "temperature": cell.temperature, "decoders": decoders}
