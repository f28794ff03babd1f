"""One pass: a batch of sequences with all its insertion points, and their loss."""

from __future__ import annotations

import torch

from vllm_ppd.train.insertion import Insertion
from vllm_ppd.train.loss import NO_TOKEN, Targets, prompt_loss
from vllm_ppd.train.model import FrozenModel, OrdinaryRows
from vllm_ppd.train.scores import Scores
from vllm_ppd.train.settings import LossKind

__all__ = ["insertion_loss"]


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
    path, for which the vocabulary head runs over every ordinary row. Raises ValueError
    when no insertion point is valid.
    """
    if ordinary is None:
        ordinary = model.ordinary_rows(ids, insertion.attention_mask)
    else:
        ordinary.drop_prompt_rows()
    sequence, target = insertion.target_index()
    following = torch.cat([ids, torch.full_like(ids[:, :1], NO_TOKEN)], dim=1)
    inside = torch.cat(
        [insertion.attention_mask, torch.zeros_like(ids[:, :1]).bool()], dim=1
    )
    tokens = following[sequence, target + 1]
    targets = Targets(
        hidden=ordinary.hidden[sequence, target],
        tokens=tokens.masked_fill(~inside[sequence, target + 1], NO_TOKEN),
        on_path=None,
    )
    if with_greedy:
        agrees = _agrees(model, ordinary.hidden, ids, chunk_elements)
        # Prediction i is on the path when the model agrees at p .. p + i - 1.
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


@torch.no_grad()
def _agrees(
    model: FrozenModel, hidden: torch.Tensor, ids: torch.Tensor, chunk_elements: int
) -> torch.Tensor:
    """bool [batch, T - 1]: the model's argmax at t is the token at t + 1."""
    rows = hidden[:, :-1].flatten(0, 1)
    chunk = max(1, chunk_elements // model.vocab_size)
    best = torch.cat([model.logits(part).argmax(dim=-1) for part in rows.split(chunk)])
    return best.view(ids.shape[0], -1) == ids[:, 1:]
