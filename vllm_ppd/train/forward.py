"""Loss of one batch with all its insertion points, and accuracy on held-out text."""

from __future__ import annotations

import math
import time

import torch
from tqdm import tqdm

from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.insertion import Insertion, sample_insertion
from vllm_ppd.train.loss import NO_TOKEN, Targets, prompt_loss
from vllm_ppd.train.model import FrozenModel, OrdinaryRows
from vllm_ppd.train.scores import Scores
from vllm_ppd.train.settings import LossKind, TrainSettings


def insertion_loss(
    model: FrozenModel,
    embeddings: torch.Tensor,
    ids: torch.Tensor,
    insertion: Insertion,
    *,
    alpha: float,
    ordinary: OrdinaryRows | None = None,
    kind: LossKind = "kl",
    chunk_elements: int = 1 << 22,
    with_scores: bool = False,
    with_greedy: bool = False,
) -> tuple[torch.Tensor, Scores | None]:
    """Loss (a scalar, see vllm_ppd.train.loss) of prompt `embeddings` [m, e, hidden].

    `ids` is int64 [batch, T]. `ordinary` is what an earlier pass over them left; the
    pass is made here without it. `with_greedy` also counts what lies on the greedy
    path, for which the vocabulary head runs over every ordinary row. At least one
    insertion point must be valid.
    """
    if ordinary is None:
        ordinary = model.ordinary_rows(ids)
    else:
        ordinary.drop_prompt_rows()
    sequence, target = insertion.target_index()
    following = torch.cat([ids, torch.full_like(ids[:, :1], NO_TOKEN)], dim=1)
    targets = Targets(
        hidden=ordinary.hidden[sequence, target],
        tokens=following[sequence, target + 1],
    )
    if with_greedy:
        # Prediction i is on the path when the model's argmax at p .. p + i - 1 is the
        # token after each.
        chunk = max(1, chunk_elements // model.vocab_size)
        parts = ordinary.hidden[:, :-1].flatten(0, 1).split(chunk)
        with torch.no_grad():
            best = torch.cat([model.logits(part).argmax(dim=-1) for part in parts])
        agrees = best.view(ids.shape[0], -1) == ids[:, 1:]
        on_path = agrees[sequence, target - 1].long().cumprod(dim=1).bool()
        targets = Targets(targets.hidden, targets.tokens, on_path)
    rows = model.prompt_rows(embeddings, insertion, ordinary)
    return prompt_loss(
        insertion.split_points(rows),
        targets,
        model.logits,
        alpha=alpha,
        kind=kind,
        chunk_elements=chunk_elements,
        with_scores=with_scores,
    )


# Held-out windows do not depend on a run's seed, so that runs can be compared.
_SEED = 20_240_528
# Accuracies need more insertion points than a step of training does.
_LEAST_POINTS = 32


@torch.no_grad()
def evaluate(
    model: FrozenModel,
    embeddings: torch.Tensor,
    stream: TokenStream,
    settings: TrainSettings,
    sequences: int = 64,
    *,
    limit: int | None = None,
    seconds: float = math.inf,
    quiet: bool = True,
) -> tuple[Scores, int]:
    """Scores of `embeddings` [m, e, hidden] on held-out windows of `stream`.

    The windows lie evenly over the text, in a random order. They and their insertion
    points are the same at every call, also the first few of them.

    Args:
        model, embeddings, settings: of the run.
        stream: of at least one window.
        sequences: how many windows there are.
        limit: take the first so many of them only.
        seconds: begin no further batch of windows after so long.
        quiet: show no progress.

    Returns:
        the scores, and of how many windows they are.
    """
    last = stream.tokens.numel() - settings.length
    starts = torch.linspace(0, last, min(sequences, last + 1)).long()
    generator = torch.Generator().manual_seed(_SEED)
    starts = starts[torch.randperm(starts.numel(), generator=generator)][:limit]
    scores = Scores.zeros(settings.num_prompt_tokens)
    begun, done = time.monotonic(), 0
    with tqdm(
        total=starts.numel(),
        desc="held-out evaluation",
        unit="seq",
        leave=False,
        disable=quiet,
    ) as bar:
        for part in starts.split(settings.batch_size):
            if done and time.monotonic() - begun >= seconds:
                break
            done += part.numel()
            bar.update(part.numel())
            ids, allowed = stream.windows(part, settings.length)
            insertion = sample_insertion(
                allowed,
                max(settings.points, _LEAST_POINTS),
                settings.num_prompt_tokens,
                settings.num_ept,
                generator,
            ).to(model.device)
            # Chats may leave windows without any word of the assistant.
            if not bool(insertion.valid.any()):
                continue
            _, batch = insertion_loss(
                model,
                embeddings,
                ids.to(model.device),
                insertion,
                alpha=settings.alpha,
                with_scores=True,
                with_greedy=True,
            )
            assert batch is not None  # asked for
            scores += batch
    return scores, done
