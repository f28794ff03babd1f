"""What the text after each insertion point says about every source of draft tokens.

The true continuation of an insertion point is known. For every list of draft tokens
that serving could make there (from a prompt row and the bigram table, from the bigram
table alone, beside an n-gram draft), the rank of the true token below the true parent
is recorded. `vllm_ppd.calibrate.rates` turns these ranks into acceptance probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vllm_ppd.calibrate.rates import StepPoints, max_advance, settled_acceptance
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.train.continuation import Continuation
from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.trees.bigram import BigramCounts, BigramTable, BigramTensors
from vllm_ppd.trees.drafting import rank_children
from vllm_ppd.trees.ngram import match_ngram

# Weights of the bigram table's gain that are tried; each prompt token gets one.
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
# Tokens of a window, next tokens per position, and positions per pass of the model.
_WINDOW, _NEXT_TOKENS, _ROWS_AT_ONCE = 256, 16, 1 << 11


@dataclass(frozen=True, eq=False)
class NgramMatches:
    """N-gram matches at every token of a batch of texts."""

    tokens: np.ndarray
    """int64 [B, L]."""
    match_class: np.ndarray
    """int64 [B, L], 0 without a match."""
    right: np.ndarray
    """int64 [B, L]: tokens of the n-gram draft before its first wrong one."""
    wrong_token: np.ndarray
    """int64 [B, L]: that wrong one, or -1."""
    first: np.ndarray
    """int64 [B]: where the model's own text begins."""
    end: np.ndarray
    """int64 [B]: one past its last token."""

    @classmethod
    def of(cls, continuation: Continuation) -> NgramMatches:
        tokens = continuation.tokens.cpu().numpy()
        match_class, right = np.zeros((2, *tokens.shape), dtype=np.int64)
        wrong_token = np.full(tokens.shape, -1)
        first, end = np.zeros((2, len(tokens)), dtype=np.int64)
        for index, written in enumerate(continuation.written.cpu().numpy()):
            own = np.flatnonzero(written)
            if len(own) < 2:
                continue
            first[index], end[index] = own[0], own[-1] + 1
            text = tokens[index, : end[index]]
            for root in range(first[index], end[index] - 1):
                match_class[index, root], draft = match_ngram(text[: root + 1])
                future = text[root + 1 : root + 1 + len(draft)]
                wrong = np.flatnonzero(draft[: len(future)] != future)
                right[index, root] = wrong[0] if len(wrong) else len(future)
                if len(wrong):
                    wrong_token[index, root] = draft[wrong[0]]
        return cls(tokens, match_class, right, wrong_token, first, end)


class AcceptanceCounts:
    """Collects insertion points batch by batch, then settles the acceptance model.

    Points of a text should be neighbours, so that decoding steps can be followed.

    Args:
        num_prompt_tokens: m.
        num_ranks: K.
        table: the bigram table; None without one.
        num_ept: rows per prompt token.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        num_ranks: int,
        table: BigramTable | None,
        num_ept: int = 1,
    ):
        self.num_ranks, self._num_ept = num_ranks, num_ept
        self._bigram = None if table is None else BigramTensors.of(table)
        self._weights = WEIGHTS if table else (0.0,)
        self._num_prompt_tokens = num_prompt_tokens
        self._first_text, self._num_texts = 0, 0
        self._points: list[StepPoints] = []

    def begin(self, continuation: Continuation) -> None:
        """Turn to another batch of texts."""
        self._matches = NgramMatches.of(continuation)
        self._first_text = self._num_texts
        self._num_texts += len(self._matches.tokens)

    def add(
        self, logits: torch.Tensor, sequence: np.ndarray, target: np.ndarray
    ) -> None:
        """Add points of the batch that was begun.

        Args:
            logits: float32 [V, m, vocabulary] of the prompt rows.
            sequence: [V] text of each point.
            target: [V, m] rows p + 1 .. p + m, of which the first is the next root.
        """
        matches, roots, logits = self._matches, target[:, 0], logits.cpu()
        parents = matches.tokens[sequence[:, None], target]
        truth = matches.tokens[sequence[:, None], target + 1]
        right = matches.right[sequence, roots]
        wrong = matches.wrong_token[sequence, roots]
        # [V, m] the n-gram draft's wrong token after right ones, else -1.
        at_wrong = np.arange(target.shape[1]) == right[:, None]
        left_out = np.where(at_wrong, wrong[:, None], -1)
        prompted = self._ranks(logits, parents, truth)
        beside = np.full_like(prompted, self.num_ranks)
        failed = left_out >= 0
        beside[:, failed] = self._ranks(
            logits[torch.from_numpy(failed)],
            parents[failed],
            truth[failed],
            left_out[failed],
        )
        then = roots[:, None] + np.arange(1, max_advance(self._num_prompt_tokens) + 1)
        # The last m tokens of a text are the root of no point: after it another text
        # begins, where matches are rare.
        last, first = matches.end - self._num_prompt_tokens, matches.first
        inside = then < last[sequence, None]
        then = np.where(inside, then, first[sequence, None])
        # The token before the wrong one is right; behind a text there is none.
        last_right = np.minimum(roots + right, matches.tokens.shape[1] - 2)
        unprompted = self._unprompted(matches.tokens, sequence, last_right, wrong)
        self._points.append(
            StepPoints(
                text=self._first_text + sequence,
                root=roots,
                # The first point of a text has the second token of its own as root.
                fresh=roots == matches.first[sequence] + 1,
                match_class=matches.match_class[sequence, roots],
                next_class=matches.match_class[sequence[:, None], then],
                right=right,
                tried=right + (wrong >= 0),
                prompted=prompted,
                beside=beside,
                unprompted=self._unprompted(
                    matches.tokens, sequence, roots, np.full(len(roots), -1)
                ),
                beside_unprompted=np.where(wrong >= 0, unprompted, self.num_ranks),
            )
        )

    def _ranks(
        self, logits: torch.Tensor, parents: np.ndarray, truth: np.ndarray, *wrong: Any
    ) -> np.ndarray:
        """int64 [W, ...]: rank of the true tokens with each weight; K if the list
        lacks it.

        Args:
            logits: float32 [..., vocabulary] of prompt rows.
            parents, truth: [...] true tokens, of each row's own position and after it.
            wrong: [...] tokens to leave out of the lists, or -1.
        """
        rows, tokens = logits.flatten(0, -2), torch.from_numpy(parents.ravel())
        excluded = [torch.from_numpy(each) for each in wrong]
        lists = [
            rank_children(rows, tokens, self._bigram, weight, self.num_ranks, *excluded)
            for weight in self._weights
        ]
        found = [_rank_in(ids.numpy(), truth.ravel()) for ids in lists]
        return np.stack(found).reshape(len(found), *truth.shape)

    def _unprompted(
        self, tokens: np.ndarray, rows: np.ndarray, parents: np.ndarray, wrong: Any
    ) -> np.ndarray:
        """[V] rank of the token after each parent in the bigram table's list."""
        if self._bigram is None:
            return np.full(len(rows), self.num_ranks)
        ids = rank_children(
            None,
            torch.from_numpy(tokens[rows, parents]),
            self._bigram,
            0.0,
            self.num_ranks,
            torch.from_numpy(wrong),
        )
        return _rank_in(ids.numpy(), tokens[rows, parents + 1])

    def settled(
        self, marginal: np.ndarray
    ) -> tuple[AcceptanceModel, tuple[float, ...]]:
        """Acceptance probabilities where steps begin, and [m] the best weights of the
        table's gain. `marginal` [m, K] is taken over all positions."""
        points = StepPoints.joined(self._points)
        model, best = settled_acceptance(points, self.num_ranks, self._num_ept)
        weights = tuple(self._weights[index] for index in best)
        return replace(model, marginal=marginal), weights


@torch.no_grad()
def count_bigrams(
    model: FrozenModel,
    stream: TokenStream,
    size: int,
    num_prompt_tokens: int,
    quiet: bool = True,
) -> BigramTable:
    """The `size` likeliest next tokens of each token, by the frozen model's own
    next-token distributions over all of `stream`."""
    counts = BigramCounts(model.vocab_size)
    window = min(_WINDOW, stream.tokens.numel())
    starts = torch.arange(0, stream.tokens.numel() - window + 1, window)
    listed = min(_NEXT_TOKENS, model.vocab_size)
    with tqdm(
        total=len(starts) * window, unit="tok", desc="bigrams", disable=quiet
    ) as bar:
        for part in starts.split(max(1, _ROWS_AT_ONCE // window)):
            tokens, _ = stream.windows(part, window)
            hidden = model.model.base_model(tokens.to(model.device), use_cache=False)
            logits = model.logits(hidden.last_hidden_state.flatten(0, 1))
            best = logits.softmax(dim=1).topk(listed, dim=1)
            counts.add(
                tokens.flatten().repeat_interleave(listed).numpy(),
                best.indices.flatten().cpu().numpy(),
                best.values.flatten().double().cpu().numpy(),
            )
            bar.update(tokens.numel())
    return counts.table(size, num_prompt_tokens)


def _rank_in(lists: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N] rank of the truth in each list [N, K]; K where it is not there."""
    same = lists == truth[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1), lists.shape[1])
