"""Rank of the true token in each prompt token's output, on the model's own text.

Held-out prompts are continued by the frozen model, greedily or by sampling, and prompt
rows are inserted at many points of each continuation. With the root at token p, the
model's ordinary output picks token p + 1, which is the next step's root; prompt token d
predicts token p + 1 + d, which is the draft token at depth d of the next step's tree.
"Distance d" is that d, here and in the tree search, from 1.

`Measurement` has marginal rates over all positions. Decoding steps start after a
rejected draft, where text is harder; `vllm_ppd.calibrate.rates` corrects for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from vllm_ppd.calibrate.counts import AcceptanceCounts
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.train.continuation import Continuation, continue_prompts
from vllm_ppd.train.data import TokenStream, prompt_starts
from vllm_ppd.train.insertion import Insertion, sample_insertion
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.scores import token_rank
from vllm_ppd.train.settings import TrainingError

# Bounds on what one pass holds: logits, and prompt rows of a sequence (their attention
# mask grows with the square of the rows, which large ensembles make many).
_CHUNK_ELEMENTS = 1 << 22
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Measurement:
    """Ranks at N insertion points."""

    ranks: torch.Tensor
    """int64 [N, m]: rank of the true token in prompt token d's output."""
    prompt: torch.Tensor
    """int64 [N]: which prompt's continuation each point lies in."""

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
        """Per distance: independent points with the same variance of the top-1 rate.

        Points of one continuation are correlated, so the variance is taken between
        continuations.
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
        z, rates = 1.96, (self.ranks == 0).double().mean(dim=0)
        points = torch.tensor(self.effective_points(), dtype=torch.float64)
        spread = rates * (1 - rates) / points + z * z / (4 * points * points)
        return (z / (1 + z * z / points) * spread.sqrt()).tolist()


@torch.no_grad()
def measure(
    model: FrozenModel,
    embeddings: torch.Tensor,
    stream: TokenStream,
    settings: CalibrationSettings,
    quiet: bool = True,
    counts: AcceptanceCounts | None = None,
) -> Measurement:
    """Ranks of the true tokens in the outputs of `embeddings` [m, e, hidden].

    Goes through prompts cut from `stream` until it has the points asked for or no
    prompt is left. `counts` gets the points, too, with all sources of draft tokens.

    Raises:
        TrainingError: not a single point is possible.
    """
    m = len(embeddings)
    generator = torch.Generator().manual_seed(settings.seed)
    starts = prompt_starts(stream, settings.prompt_length)
    starts = starts[torch.randperm(starts.numel(), generator=generator)]
    ranks, owners = [], []
    done = prompts_done = 0
    embeddings = embeddings.to(model.device)
    with tqdm(
        total=settings.points, unit="pt", desc="calibrating", disable=quiet
    ) as bar:
        while done < settings.points and prompts_done < starts.numel():
            missing = -(-(settings.points - done) // settings.points_per_prompt)
            size = min(settings.batch_size, missing)
            part = starts[prompts_done : prompts_done + size]
            prompts, _ = stream.windows(part, settings.prompt_length)
            continuation = continue_prompts(
                model, prompts, settings.continuation, settings.temperature, generator
            )
            first, prompts_done = prompts_done, prompts_done + part.numel()
            written = continuation.written.cpu()
            # Points p with p .. p + m + 1 in the model's own words: sample_insertion
            # looks at p .. p + m, and the last true token is one further.
            allowed = written[:, :-1] & written[:, 1:]
            if allowed.shape[1] <= m:
                continue
            insertion = sample_insertion(
                allowed,
                settings.points_per_prompt,
                m,
                embeddings.shape[1],
                generator,
                # Neighbours show where decoding steps begin.
                in_a_row=True,
            )
            if not bool(insertion.valid.any()):
                continue
            batch = _measure_batch(model, embeddings, continuation, insertion, counts)
            ranks.append(batch.ranks)
            owners.append(batch.prompt + first)
            done += batch.num_points
            bar.update(min(batch.num_points, bar.total - bar.n))
    if done == 0:
        raise TrainingError(
            f"after none of {prompts_done} prompts does the model write {m + 2} tokens "
            "before it ends its text; use other text or a higher temperature"
        )
    return Measurement(torch.cat(ranks), torch.cat(owners))


def _measure_batch(
    model: FrozenModel,
    embeddings: torch.Tensor,
    continuation: Continuation,
    insertion: Insertion,
    counts: AcceptanceCounts | None,
) -> Measurement:
    """All points of a batch; `prompt` counts from the batch's first."""
    m, e, _ = embeddings.shape
    if counts is not None:
        counts.begin(continuation)
    ranks, owners = [], []
    at_once = max(1, _ROWS_AT_ONCE // (m * e))
    chunk = max(1, _CHUNK_ELEMENTS // (model.vocab_size * m * e))
    for points, valid in zip(
        insertion.points.split(at_once, dim=1),
        insertion.valid.split(at_once, dim=1),
        strict=True,
    ):
        part = replace(insertion, points=points, valid=valid).to(model.device)
        rows = model.prompt_rows(embeddings, part, continuation.ordinary)
        # Without these rows the cache serves the next points.
        continuation.ordinary.cache.crop(-rows.shape[1])
        sequences, targets = part.target_index()
        hidden = part.split_points(rows)
        for first in range(0, len(hidden), chunk):
            piece = slice(first, first + chunk)
            sequence, target = sequences[piece], targets[piece]
            # Ensembles average their logits, as the engine does.
            logits = model.logits(hidden[piece]).mean(dim=2)
            # Row p + d, which prompt token d stands in for, predicts p + d + 1.
            truth = continuation.tokens[sequence, target + 1]
            rank = token_rank(logits.flatten(0, 1), truth.flatten())
            ranks.append(rank.view(-1, m).cpu())
            owners.append(sequence[:, 0].cpu())
            if counts is not None:
                counts.add(logits, owners[-1].numpy(), target.cpu().numpy())
    return Measurement(torch.cat(ranks), torch.cat(owners))
