"""Accuracy of prompt tokens on held-out text."""

from __future__ import annotations

import torch

from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.forward import insertion_loss
from vllm_ppd.train.insertion import sample_insertion
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.scores import Scores
from vllm_ppd.train.settings import TrainSettings

__all__ = ["evaluate"]

# Held-out points do not depend on a run's seed, so that runs can be compared.
_SEED = 20_240_528
# Rates want more of them than a step of training does.
_LEAST_POINTS = 32


@torch.no_grad()
def evaluate(
    model: FrozenModel,
    embeddings: torch.Tensor,
    stream: TokenStream,
    settings: TrainSettings,
    sequences: int = 64,
) -> Scores:
    """Scores of `embeddings` [m, e, hidden] on evenly spaced windows of `stream`.

    The windows and their insertion points are the same at every call. Raises
    ValueError when the stream is shorter than a window.
    """
    last = stream.tokens.numel() - settings.length
    if last < 0:
        raise ValueError(
            f"the held-out text has {stream.tokens.numel()} tokens; expected at least "
            f"one window of {settings.length}: use more text or a smaller length"
        )
    starts = torch.linspace(0, last, min(sequences, last + 1)).long()
    generator = torch.Generator().manual_seed(_SEED)
    scores = Scores.zeros(settings.num_prompt_tokens)
    for part in starts.split(settings.batch_size):
        ids, allowed = stream.windows(part, settings.length)
        insertion = sample_insertion(
            torch.ones_like(ids),
            max(settings.points, _LEAST_POINTS),
            settings.num_prompt_tokens,
            settings.num_ept,
            generator,
            allowed,
        ).to(model.device)
        # Chats may leave windows without any word of the assistant.
        if not bool(insertion.valid.any()):
            continue
        _, found = insertion_loss(
            model,
            embeddings,
            ids.to(model.device),
            insertion,
            alpha=settings.alpha,
            with_scores=True,
            with_greedy=True,
        )
        if found is not None:
            scores += found
    return scores
