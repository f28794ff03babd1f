"""Verification: vLLM's own sampler at every node, then the walk.

vLLM draws a token's noise from (seed, position). Nodes have the positions that plain
decoding would give their tokens, so a node's sample *is* the token of plain decoding
with that history, and all nodes can be sampled at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_ppd.engine.v2.bigram_learner import BigramLearner
from vllm_ppd.engine.v2.step_trees import step_of
from vllm_ppd.kernels.triton.tree_walk import Walk, tree_walk


class TreeSampler:
    """Takes the place of vLLM's ``RejectionSampler`` in steps that have trees.

    Attributes:
        learner: told of every walk, once there is traffic; None if nothing is learnt.
    """

    # vLLM's warm-up asks.
    enable_adaptive_verification = False

    def __init__(self, sampler: Sampler, vocab_size: int):
        self.sampler = sampler
        self._vocab_size = vocab_size
        self.learner: BigramLearner | None = None

    def __call__(
        self,
        logits: torch.Tensor,  # [L, vocabulary]
        input_batch: InputBatch,  # with_node_logits
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,  # bool [L]
    ) -> SamplerOutput:
        step = step_of(input_batch)
        assert step is not None, "a step with drafts has trees"
        sampled, processed = self._sample(logits, input_batch)
        walk = tree_walk(
            step.tables,
            step.tree_ids,
            step.starts,
            step.num_rows,
            _without(invalid_drafts, input_batch),
            sampled,
            input_batch.cu_num_logits[:-1],
        )
        step.walk = walk
        if self.learner is not None:
            self.learner.after_walk(walk, logits, input_batch)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            walk.num_sampled,
            input_batch.seq_lens,
            # Every scheduled row counts, whether it had logits or not.
            step.row_ends,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        use_processed = self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        return SamplerOutput(
            sampled_token_ids=walk.tokens,
            logprobs_tensors=self._logprobs(
                processed if use_processed else logits, walk, input_batch
            ),
            num_nans=(
                get_num_nans(logits[input_batch.cu_num_logits[:-1]])
                if self.sampler.compute_nans
                else None
            ),
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _sample(
        self, logits: torch.Tensor, batch: InputBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's token after every row, and the logits it was drawn from."""
        positions = batch.positions[batch.logits_indices]
        ids = batch.input_ids[batch.logits_indices]
        # Logits processors index by token ids. Prompt tokens have none; they come last,
        # and what their rows give is not used.
        ids = torch.where(ids < self._vocab_size, ids, 0)
        return_logprobs = self.sampler.get_logprobs_dims(batch.idx_mapping_np)
        seq_lens = batch.seq_lens_cpu_upper_bound.numpy()
        sampled, processed = [], []
        limit = get_max_chunk_logits(logits.shape[1])
        for first, end in _chunks(batch.cu_num_logits_np, limit):
            part = slice(*batch.cu_num_logits_np[[first, end]].tolist())
            tokens, from_logits = self.sampler.sample(
                logits[part],
                batch.expanded_idx_mapping[part],
                batch.idx_mapping[first:end],
                batch.idx_mapping_np[first:end],
                positions[part],
                ids[part],
                batch.expanded_local_pos[part],
                seq_lens[first:end],
                return_logprobs=return_logprobs is not None,
            )
            sampled.append(tokens)
            processed.append(from_logits)
        if len(sampled) == 1:
            return sampled[0], processed[0]
        use_processed = self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        return torch.cat(sampled), torch.cat(processed) if use_processed else logits

    def _logprobs(
        self, logits: torch.Tensor, walk: Walk, batch: InputBatch
    ) -> LogprobsTensors | None:
        """Scores of the emitted tokens, D + 1 rows per request along its path."""
        dims = self.sampler.get_logprobs_dims(batch.idx_mapping_np)
        if dims is None:
            return None
        num_logprobs, max_token_ids = dims
        length = walk.paths.shape[1]
        rows = (batch.cu_num_logits[:-1, None] + walk.paths).flatten()
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            walk.tokens.clamp(min=0).flatten(),
            list(range(0, length * batch.num_reqs + 1, length)),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.idx_mapping.repeat_interleave(length),
            max_per_req_token_ids=max_token_ids,
            logits_mode=self.sampler.logprobs_mode
            in ("raw_logits", "processed_logits"),
        )


def _without(invalid: torch.Tensor | None, batch: InputBatch) -> torch.Tensor:
    """The step's tokens; draft tokens that a grammar has not checked become -1."""
    if invalid is None:
        return batch.input_ids
    ids = batch.input_ids.clone()
    rows = batch.logits_indices
    ids[rows] = batch.input_ids[rows].masked_fill(invalid, -1)
    return ids


def _chunks(ends: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole requests with at most ``limit`` rows each, or one request."""
    first, num_reqs = 0, len(ends) - 1
    while first < num_reqs:
        end = int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1
        end = min(num_reqs, max(first + 1, end))
        yield first, end
        first = end
