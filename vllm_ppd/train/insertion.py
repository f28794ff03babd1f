"""Insertion points of prompt tokens in training sequences, and their attention mask.

Row layout of one sequence (the paper has one insertion, here are many at once):

    [T ordinary rows][point 0: m * e prompt rows][point 1: m * e prompt rows] ...

Within a point the rows are prompt-token major, EPT minor. An insertion point p is the
index of its root, the last token that its prompt rows attend to. Prompt token i (1..m)
sits at the root's position + i and learns the frozen model's distribution there: that
of token p + i + 1. EPT j of prompt token i attends to the ordinary rows up to p and to
EPT j of prompt tokens 1..i of its own point. Ordinary rows never attend to prompt rows,
so they give the target distributions in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Insertion:
    """Insertion points of a batch and the row layout that follows from them."""

    points: torch.Tensor
    """int64 [batch, P]: index of each root in its sequence, ascending."""
    valid: torch.Tensor
    """bool [batch, P]: False where the sequence had too few places; such a point takes
    rows, so that the batch stays rectangular, but no part in the loss."""
    length: int
    """T: tokens of each sequence; none is padded."""
    num_prompt_tokens: int
    num_ept: int

    def to(self, device: torch.device) -> Insertion:
        """The same on another device."""
        points, valid = self.points.to(device), self.valid.to(device)
        return replace(self, points=points, valid=valid)

    def position_ids(self) -> torch.Tensor:
        """int64 [batch, R]: positions of the R = P * m * e prompt rows."""
        steps = torch.arange(1, self.num_prompt_tokens + 1, device=self.points.device)
        steps = steps.repeat_interleave(self.num_ept)
        return (self.points[:, :, None] + steps).flatten(1)

    def mask(self) -> torch.Tensor:
        """bool [batch, 1, R, T + R]: True where a prompt row attends.

        These are the last R rows of the square mask over [T ordinary][R prompt] rows;
        the first T are the causal mask, False on every prompt row.
        """
        batch, points = self.points.shape
        per_point = self.num_prompt_tokens * self.num_ept
        count = points * per_point
        device = self.points.device
        roots = self.points.repeat_interleave(per_point, dim=1)
        context = torch.arange(self.length, device=device) <= roots[:, :, None]
        row = torch.arange(count, device=device)
        point, token = row // per_point, row % per_point // self.num_ept
        ept = row % self.num_ept
        earlier = (
            (point[:, None] == point)
            & (ept[:, None] == ept)
            & (token[:, None] >= token)
        )
        mask = torch.cat([context, earlier.expand(batch, -1, -1)], dim=2)
        return mask[:, None]

    def target_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the V valid points find their targets.

        Returns int64 [V, 1], the sequence of each point, and int64 [V, m], the ordinary
        rows p + 1 .. p + m whose output distribution prompt tokens 1..m should match.
        """
        sequence, point = self.valid.nonzero(as_tuple=True)
        steps = torch.arange(1, self.num_prompt_tokens + 1, device=sequence.device)
        return sequence[:, None], self.points[sequence, point][:, None] + steps

    def split_points(self, rows: torch.Tensor) -> torch.Tensor:
        """Prompt rows [batch, R, hidden] as [V, m, e, hidden], valid points only."""
        sizes = (self.points.shape[1], self.num_prompt_tokens, self.num_ept)
        return rows.unflatten(1, sizes)[self.valid]


def sample_insertion(
    allowed: torch.Tensor,
    points_per_sequence: int,
    num_prompt_tokens: int,
    num_ept: int,
    generator: torch.Generator,
    in_a_row: bool = False,
) -> Insertion:
    """Draw insertion points uniformly, without repetition within a sequence.

    `in_a_row`: a run of neighbouring places instead, wherever it begins; one that is
    cut by the first or last place is shorter.

    `allowed` is bool [batch, T]: in chats, the assistant's turns. A root p qualifies
    when p .. p + m are all allowed. Everything is on the CPU, so that one seed means
    the same points on every device. T must leave room for m tokens after a root.
    """
    # A window of m + 1 allowed tokens starts at each place that qualifies.
    places = allowed.unfold(1, num_prompt_tokens + 1, 1).all(dim=2)
    score = torch.rand(places.shape, generator=generator)
    score = score.masked_fill(~places, -1.0)
    count = min(points_per_sequence, places.shape[1])
    if in_a_row:
        order, total = places.cumsum(dim=1) - 1, places.sum(dim=1, keepdim=True)
        draw = torch.rand(len(places), 1, generator=generator)
        # A run may begin left of the first place; so all places are as often in one.
        overhang = (count - 1) * (total > count)
        first = (draw * (total + overhang).clamp(min=1)).long() - overhang
        first = torch.where(total > count, first, 0)
        places = places & (order >= first) & (order < first + count)
        score = places.float()
    points = score.topk(count, dim=1).indices.sort(dim=1).values
    return Insertion(
        points=points,
        valid=places.gather(1, points),
        length=allowed.shape[1],
        num_prompt_tokens=num_prompt_tokens,
        num_ept=num_ept,
    )
