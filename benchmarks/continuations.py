"""Prompts cut from held-out text, and how good guesses are all along what follows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_ppd.calibrate.measure import Measurement, measure, prompt_starts
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.model import FrozenModel


def measure_texts(
    model: FrozenModel,
    prompts: PromptTokens,
    stream: TokenStream,
    lengths: Mapping[str, int],
    count: int,
    temperature: float,
) -> Measurement:
    """Ranks at every place of `count` continuations."""
    places = lengths["continuation"] - prompts.num_prompt_tokens - 1
    settings = CalibrationSettings(
        points=count * places,
        points_per_prompt=places,
        temperature=temperature,
        batch_size=min(count, 32),
        **lengths,
    )
    return measure(model, prompts.embeddings, stream, settings)


def prompt_ids(stream: TokenStream, length: int, count: int) -> list[list[int]]:
    """`count` prompts from all over the text.

    Raises ValueError when there are too few.
    """
    starts = prompt_starts(stream, length)
    if starts.numel() < count:
        raise ValueError(
            f"the held-out text has {starts.numel()} prompts of {length} tokens, and "
            f"{count} are asked for; lower --num-prompts"
        )
    order = torch.randperm(starts.numel(), generator=torch.Generator().manual_seed(0))
    ids, _ = stream.windows(starts[order[:count]], length)
    return ids.tolist()
