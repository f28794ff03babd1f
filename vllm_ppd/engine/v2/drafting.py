"""DraftInputs for trees from all that is known, without leaving the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm.v1.worker.gpu.states import RequestState

from vllm_ppd.kernels.fill_tree import DeviceDraftInputs
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.triton.fill_tree import fill_tree
from vllm_ppd.kernels.triton.ngram import match_ngrams
from vllm_ppd.trees.drafting import POOL, BigramTensors

# Tokens of a request's context in which an earlier match is looked for.
_MATCHED = 4096


class AcceptanceModel(NamedTuple):
    """What requests' own tokens say about the next ones. B requests."""

    roots: torch.Tensor  # int32 [B]: the last token
    classes: torch.Tensor  # int32 [B]: how long an earlier match of the last ones is
    chains: torch.Tensor  # int32 [B, L]: what came after it, -1 padded


class Drafter:
    """Fills trees.

    Args:
        tables: the trees.
        max_children: most children of any node, plus what their ranks skip.
        vocab_size: V.
        num_classes: match classes of the plan; 1 if it looks for no matches.
        requests: vLLM's state of all requests.
        bigram: the bigram table, if there is one.
        weights: float32 [M] its weight at each prompt token; None without one.
    """

    def __init__(
        self,
        tables: DeviceTables,
        max_children: int,
        vocab_size: int,
        num_classes: int,
        requests: RequestState,
        bigram: BigramTensors | None,
        weights: torch.Tensor | None,
    ):
        device = requests.device
        self._tables = tables
        self._requests = requests
        self._pool = min(max(POOL, max_children + 1), vocab_size)
        self._matching = num_classes > 1
        most = requests.max_num_reqs
        # Stand for what is not looked for, or not there.
        self._zeros = torch.zeros(most, dtype=torch.int32, device=device)
        self._no_chains = self._zeros.new_full((most, 1), -1)
        prompts = max(1, tables.num_prompt_tokens)
        self._no_logits = torch.zeros(1, device=device).expand(1, prompts, vocab_size)
        self._no_pool = torch.zeros(
            1, prompts, self._pool, dtype=torch.int64, device=device
        )
        self._no_scores = torch.zeros(1, prompts, self._pool, device=device)
        self._successors = bigram
        self._weights = torch.ones(prompts, device=device)
        if weights is not None:
            self._weights = weights

    def match(self, slots: torch.Tensor) -> AcceptanceModel:
        """Look up what is known of requests before any prompt row is.

        Args:
            slots: int64 [B] their slots.
        """
        tokens, ends = self._requests.all_token_ids.gpu, self._requests.total_len.gpu
        roots = tokens[slots, ends[slots] - 1]
        if self._matching:
            return AcceptanceModel(roots, *match_ngrams(tokens, slots, ends, _MATCHED))
        return AcceptanceModel(
            roots, self._zeros[: len(slots)], self._no_chains[: len(slots)]
        )

    def fill(
        self,
        trees: torch.Tensor,  # int64 [B]
        evidence: AcceptanceModel,
        counts: torch.Tensor | None,  # int [B]: prompt tokens whose logits are there
        logits: torch.Tensor | None,  # float [B, M, V]
        drafts: torch.Tensor,  # int64 [B, K]: written
    ) -> None:
        """Guess the rows after the root of each request's tree."""
        if logits is None or counts is None:
            counts, logits = self._zeros[: len(trees)], self._no_logits
            pool, scores = self._no_pool, self._no_scores
        else:
            scores, pool = logits.topk(self._pool)
        fill_tree(
            self._tables,
            trees,
            DeviceDraftInputs(
                counts, logits, pool, scores, evidence.roots, evidence.chains
            ),
            self._successors,
            self._weights,
            drafts,
        )
