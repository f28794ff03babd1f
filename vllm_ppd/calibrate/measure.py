"""How often each candidate is right, measured on the model's own continuations.

Held-out prompts are continued by the frozen model, greedily or by sampling, and prompt
rows are inserted at many points of each continuation. With the root at token p, the
model's ordinary output picks token p + 1, which is the next step's root; prompt token d
predicts token p + 1 + d, which is the candidate at depth d of the next step's tree.
"Distance d" is that d, here and in the tree search, from 1.

Rates are marginal: taken over all points, whatever the nearer prompt tokens guessed,
and all points count alike, whereas in decoding a step begins where a guess failed;
`AcceptanceCounts` looks at those. `Measurement.given_earlier` says how far from
independent the distances are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from vllm_ppd.calibrate.counts import AcceptanceCounts
from vllm_ppd.calibrate.reliability import Reliability
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.train.continuation import Continuation, continue_prompts
from vllm_ppd.train.data import TokenStream, prompt_starts
from vllm_ppd.train.insertion import Insertion, sample_insertion
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.scores import token_rank
from vllm_ppd.train.settings import TrainingError

__all__ = ["Measurement", "measure", "prompt_starts"]

# Bounds on what one pass holds: logits, and prompt rows of a sequence (their attention
# mask grows with the square of the rows, which large ensembles make many).
_CHUNK_ELEMENTS = 1 << 22
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Measurement:
    """What N insertion points said."""

    ranks: torch.Tensor
    """int64 [N, m]: rank of the true token among prompt token d's candidates."""
    prompt: torch.Tensor
    """int64 [N]: which prompt's continuation each point lies in."""
    reliability: Reliability

    @property
    def num_points(self) -> int:
        return self.ranks.shape[0]

    @property
    def num_prompts(self) -> int:
        """Prompts with at least one point."""
        return int(self.prompt.unique().numel())

    def acceptance(self, num_ranks: int) -> np.ndarray:
        """float64 [m, num_ranks]: share of points whose true token has that rank."""
        counts = [
            torch.bincount(column[column < num_ranks], minlength=num_ranks)
            for column in self.ranks.T
        ]
        return torch.stack(counts).double().numpy() / self.num_points

    def effective_points(self) -> list[float]:
        """Per distance: independent points that would tell the top-1 rate as well.

        Points of one continuation resemble each other (models repeat themselves), so
        the variance is taken between continuations.
        """
        hits = (self.ranks == 0).double()
        mean = hits.mean(dim=0)
        groups = torch.zeros(int(self.prompt.max()) + 1, hits.shape[1]).double()
        sums = groups.index_add(0, self.prompt, hits - mean)
        few = self.num_prompts / max(1, self.num_prompts - 1)
        variance = few * sums.square().sum(dim=0) / self.num_points
        independent = mean * (1 - mean)
        inflation = torch.where(independent > 0, variance / independent, 1.0)
        return (self.num_points / inflation.clamp(min=1)).tolist()

    def half_widths(self) -> list[float]:
        """Per distance: half the 95 % Wilson interval of the top-1 rate."""
        rates = (self.ranks == 0).double().mean(dim=0).tolist()
        return [
            _wilson_half_width(rate, points)
            for rate, points in zip(rates, self.effective_points(), strict=True)
        ]

    def given_earlier(self, top: int) -> list[float]:
        """Per distance: rate of rank < `top` where it held at all nearer distances.

        Equals the marginal rate if distances are independent; 0 without such points.
        """
        inside = (self.ranks < top).long()
        held = inside.cumprod(dim=1).sum(dim=0).double()
        before = torch.cat([torch.tensor([self.num_points]).double(), held[:-1]])
        return (held / before.clamp(min=1)).tolist()


@torch.no_grad()
def measure(
    model: FrozenModel,
    embeddings: torch.Tensor,
    stream: TokenStream,
    settings: CalibrationSettings,
    quiet: bool = True,
    counts: AcceptanceCounts | None = None,
) -> Measurement:
    """Ranks of the true tokens among the candidates of `embeddings` [m, e, hidden].

    counts: also counts what serving's other candidate lists would have held.

    Goes through prompts cut from `stream` until it has the points asked for or there
    are no more prompts. Raises TrainingError when settings, prompt tokens and model do
    not go together, TrainingError when not a single point is found.
    """
    distances = embeddings.shape[0]
    settings.check_fits(distances, model.vocab_size)
    generator = torch.Generator().manual_seed(settings.seed)
    starts = prompt_starts(stream, settings.prompt_length)
    starts = starts[torch.randperm(starts.numel(), generator=generator)]
    reliability = Reliability.zeros(distances)
    ranks, owners = [], []
    done = used = 0
    embeddings = embeddings.to(model.device)
    with tqdm(
        total=settings.points, unit="pt", desc="calibrating", disable=quiet
    ) as bar:
        while done < settings.points and used < starts.numel():
            missing = -(-(settings.points - done) // settings.points_per_prompt)
            part = starts[used : used + min(settings.batch_size, missing)]
            prompts, _ = stream.windows(part, settings.prompt_length)
            continuation = continue_prompts(
                model, prompts, settings.continuation, settings.temperature, generator
            )
            insertion = _insertion(continuation, embeddings, settings, generator)
            if insertion is not None:
                found = _measure_batch(
                    model, embeddings, continuation, insertion, settings.ranks, counts
                )
                ranks.append(found.ranks)
                owners.append(found.prompt + used)
                reliability += found.reliability
                done += found.num_points
                bar.update(min(found.num_points, bar.total - bar.n))
            used += part.numel()
    if done == 0:
        raise TrainingError(
            f"after none of {used} prompts does the model write {distances + 2} tokens "
            "before it ends its text; use other text or a higher temperature"
        )
    return Measurement(torch.cat(ranks), torch.cat(owners), reliability)


def _insertion(
    continuation: Continuation,
    embeddings: torch.Tensor,
    settings: CalibrationSettings,
    generator: torch.Generator,
) -> Insertion | None:
    """Points p with p .. p + m + 1 in the model's own words; None without any."""
    m, e, _ = embeddings.shape
    written = continuation.written.cpu()
    # sample_insertion looks at p .. p + m; the last true token is one further.
    allowed = written[:, :-1] & written[:, 1:]
    if allowed.shape[1] <= m:
        return None
    insertion = sample_insertion(
        torch.ones_like(allowed),
        settings.points_per_prompt,
        m,
        e,
        generator,
        allowed,
        # Neighbours show where steps of decoding begin.
        in_a_row=True,
    )
    return insertion if bool(insertion.valid.any()) else None


def _measure_batch(
    model: FrozenModel,
    embeddings: torch.Tensor,
    continuation: Continuation,
    insertion: Insertion,
    num_ranks: int,
    counts: AcceptanceCounts | None,
) -> Measurement:
    """All points of a batch; `prompt` counts from the batch's first."""
    m, e, _ = embeddings.shape
    ranks, owners = [], []
    reliability = Reliability.zeros(m)
    step = max(1, _ROWS_AT_ONCE // (m * e))
    if counts is not None:
        counts.add_texts(continuation)
    for first in range(0, insertion.points.shape[1], step):
        some = slice(first, first + step)
        part = replace(
            insertion,
            points=insertion.points[:, some],
            valid=insertion.valid[:, some],
        )
        part = part.to(model.device)
        rows = model.prompt_rows(embeddings, part, continuation.ordinary)
        # Without these rows the cache serves the next points.
        continuation.ordinary.cache.crop(-rows.shape[1])
        sequence, target = part.target_index()
        # Ordinary row p + d, which prompt token d stands in for, predicts p + d + 1.
        truth = continuation.tokens[sequence, target + 1]
        if counts is not None:
            counts.add_points(sequence, target)
        hidden = part.split_points(rows)
        rank, values = _rank(model, hidden, truth, num_ranks, counts)
        at = torch.arange(m, device=rank.device).repeat(rank.shape[0])
        reliability += Reliability.of(m, at, values.flatten(0, 1), rank.flatten())
        ranks.append(rank.cpu())
        owners.append(sequence[:, 0].cpu())
        if counts is not None:
            counts.end_points()
    return Measurement(torch.cat(ranks), torch.cat(owners), reliability)


def _rank(
    model: FrozenModel,
    hidden: torch.Tensor,
    truth: torch.Tensor,
    num_ranks: int,
    counts: AcceptanceCounts | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of prompt rows [V, m, e, hidden] and their true tokens [V, m].

    Returns int64 [V, m], the rank of the truth, and float32 [V, m, K], probabilities
    of the best candidates. Ensembles average their logits, as the engine does.
    """
    ranks, values = [], []
    rows = hidden.flatten(0, 1)
    chunk = max(1, _CHUNK_ELEMENTS // (model.vocab_size * hidden.shape[2]))
    done = 0
    for part, token in zip(
        rows.split(chunk), truth.flatten().split(chunk), strict=True
    ):
        logits = model.logits(part).mean(dim=1)
        if counts is not None:
            counts.add_logits(done, logits)
            done += len(logits)
        ranks.append(token_rank(logits, token))
        values.append(logits.softmax(dim=1).topk(num_ranks, dim=1).values)
    return torch.cat(ranks).view(truth.shape), torch.cat(values).unflatten(
        0, truth.shape
    )


def _wilson_half_width(rate: float, points: float, z: float = 1.96) -> float:
    spread = rate * (1 - rate) / points + z * z / (4 * points * points)
    return z / (1 + z * z / points) * math.sqrt(spread)
