"""The training loss, with the vocabulary seen a few rows at a time.

Loss (as in the paper's training): the mean over insertion points of
`sum_i alpha^(i-1) * KL(target_i || prompt_i)`, where target_i is the frozen model's
distribution at the ordinary row p + i and prompt_i the softmax of the logits averaged
over the e outputs of prompt token i. The hard-label variant takes the cross-entropy
with the true token p + i + 1 instead.

Logits of all rows at once would dominate memory (a 128k vocabulary takes 0.5 MB a row
in float32). Each chunk's gradient is therefore taken in the forward pass and only
the gradient of its hidden rows kept: nothing of vocabulary width outlives its chunk,
and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vllm_ppd.train.scores import TOP, Scores, token_rank
from vllm_ppd.train.settings import LossKind

Head = Callable[[torch.Tensor], torch.Tensor]

NO_TOKEN = -100
"""Label of a prediction whose true token lies beyond the sequence."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of the predictions of V insertion points."""

    hidden: torch.Tensor
    """[V, m, hidden]: last-layer output of the ordinary rows p + 1 .. p + m."""
    tokens: torch.Tensor
    """int64 [V, m]: the true tokens p + 2 .. p + m + 1, or NO_TOKEN."""
    on_path: torch.Tensor | None = None
    """bool [V, m]: see `Scores.greedy`; None counts no prediction as such."""


def prompt_loss(
    prompt_hidden: torch.Tensor,
    targets: Targets,
    head: Head,
    *,
    alpha: float,
    kind: LossKind = "kl",
    chunk_elements: int = 1 << 22,
    with_scores: bool = False,
) -> tuple[torch.Tensor, Scores | None]:
    """Loss of V insertion points, a float32 scalar, and their scores if asked for.

    `prompt_hidden` [V, m, e, hidden] carries the gradient; `head` maps [..., hidden] to
    float32 logits; `chunk_elements` bounds the elements of one tensor of logits.
    """
    count, distances, ept, _ = prompt_hidden.shape
    tokens, on_path = targets.tokens, targets.on_path
    if on_path is None:
        on_path = torch.zeros_like(tokens, dtype=torch.bool)
    counted = torch.ones_like(tokens) if kind == "kl" else (tokens != NO_TOKEN)
    powers = alpha ** torch.arange(distances, device=tokens.device)
    # Distance i counts alpha^(i-1), over the number of points that count.
    weight = counted.float() * powers / counted.sum(dim=0).clamp(min=1)
    rows = _Rows(
        target=targets.hidden.detach().flatten(0, 1),
        token=tokens.flatten(),
        on_path=on_path.flatten(),
        distance=torch.arange(distances, device=tokens.device).repeat(count),
        weight=weight.flatten(),
        head=head,
        kind=kind,
        scores=Scores.zeros(distances) if with_scores else None,
    )
    with torch.no_grad():
        vocabulary = head(rows.target[:1]).shape[-1]
    chunk = max(1, chunk_elements // (vocabulary * ept))
    loss = _ChunkedLoss.apply(prompt_hidden.flatten(0, 1), rows, chunk)
    return loss, rows.scores


@dataclass
class _Rows:
    """The N = V * m predictions of a batch, in chunks; adds up their scores."""

    target: torch.Tensor  # [N, hidden]
    token: torch.Tensor  # int64 [N]
    on_path: torch.Tensor  # bool [N]
    distance: torch.Tensor  # int64 [N], from 0
    weight: torch.Tensor  # float32 [N]
    head: Head
    kind: LossKind
    scores: Scores | None

    def loss(self, prompt: torch.Tensor, part: slice) -> torch.Tensor:
        """Weighted loss of rows `part`, given their `prompt` [n, e, hidden]."""
        draft = F.log_softmax(self.head(prompt).mean(dim=1), dim=-1)
        if self.kind == "labels":
            token = self.token[part].clamp(min=0)
            losses = -draft.gather(1, token[:, None])[:, 0]
        if self.kind == "kl" or self.scores is not None:
            with torch.no_grad():
                target = F.log_softmax(self.head(self.target[part]), dim=-1)
            # In nats, of log-probabilities.
            kl = F.kl_div(draft, target, reduction="none", log_target=True)
            divergence = kl.sum(dim=1)
            if self.kind == "kl":
                losses = divergence
            if self.scores is not None:
                self.scores += self._score(target, draft, divergence, part)
        return (losses * self.weight[part]).sum()

    @torch.no_grad()
    def _score(
        self,
        target: torch.Tensor,
        draft: torch.Tensor,
        divergence: torch.Tensor,
        part: slice,
    ) -> Scores:
        at, token = self.distance[part], self.token[part]
        labelled, on_path = token != NO_TOKEN, self.on_path[part]
        model_rank = token_rank(draft, target.argmax(dim=1))
        true_rank = token_rank(draft, token.clamp(min=0))
        distances = int(self.distance[-1]) + 1

        def total(values: torch.Tensor) -> torch.Tensor:
            dtype = torch.float64 if values.is_floating_point() else torch.int64
            zeros = torch.zeros(distances, dtype=dtype)
            return zeros.index_add(0, at.cpu(), values.cpu().to(dtype))

        return Scores(
            points=total(torch.ones_like(at)),
            kl=total(divergence),
            model_top1=total(model_rank < 1),
            model_top10=total(model_rank < TOP),
            labelled=total(labelled),
            true_top1=total(labelled & (true_rank < 1)),
            true_top10=total(labelled & (true_rank < TOP)),
            greedy=total(on_path),
            greedy_top1=total(on_path & (model_rank < 1)),
            greedy_top10=total(on_path & (model_rank < TOP)),
        )


class _ChunkedLoss(torch.autograd.Function):
    """Sum of `rows.loss` over chunks, with the gradient taken chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, prompt: torch.Tensor, rows: _Rows, chunk: int
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(prompt) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=prompt.device)
        for start in range(0, prompt.shape[0], chunk):
            part = slice(start, start + chunk)
            leaf = prompt[part].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                loss = rows.loss(leaf, part)
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None
