"""Verification with vLLM's own sampler, one call per level of the trees.

Plain decoding is one sampler call per token. A walk that accepts ``d`` draft tokens
makes the same ``d + 1`` calls on the same logits with the same history, so penalties,
bad words, minimum lengths, seeds and logprobs need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors, build_logitsprocs
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_ppd.kernels.cpu.tree_walk import walk_greedy_cpu
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.verify import TreeWalk, kv_moves


def logitsprocs_without_drafts(config: VllmConfig, *args: Any) -> LogitsProcessors:
    """The logits processors of an engine without drafts.

    Where the configuration speculates, vLLM leaves out min_p and logit_bias and refuses
    custom ones. Walks and plain steps sample one row per request.
    """
    config = copy(config)
    config.speculative_config = None
    return build_logitsprocs(config, *args)


def walk_trees(
    runner: Any, step: TreeStep, tokens: np.ndarray, logits: torch.Tensor
) -> tuple[TreeWalk, np.ndarray, np.ndarray, SamplerOutput]:
    """Run all walks to their ends.

    Args:
        runner: the V1 model runner.
        step: the layout of the batch's trees.
        tokens: int32 [sum of num_nodes] token of every node.
        logits: [sum of num_nodes, vocabulary] of every node.

    Returns:
        the walk, its KV moves (sources and targets), and vLLM's sampler output with
        [B, longest walk] token ids, -1 padded.
    """
    metadata = runner.input_batch.sampling_metadata
    logprobs: list[LogprobsTensors | None] = [None]
    if _is_plain_greedy(metadata):
        picked = runner.sampler.greedy_sample(logits.to(torch.float32))
        walk, sources, targets = walk_greedy_cpu(step, tokens, picked.cpu().numpy())
    else:
        walk = TreeWalk(step, tokens)
        logprobs = _walk_by_level(runner, walk, logits, metadata)
        sources, targets = kv_moves(step, walk)
    emitted = walk.tokens_out[:, : int(walk.lengths.max())]
    output = SamplerOutput(
        sampled_token_ids=torch.from_numpy(emitted.astype(np.int32)),
        logprobs_tensors=_stack(logprobs),
    )
    return walk, sources, targets, output


def _needs_logits_only(metadata: SamplingMetadata, processors: Iterable[Any]) -> bool:
    """Whether tokens depend on nothing but their logits, and no more is asked.

    processors: those of vLLM's logits processors that would matter.
    """
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and all(_is_idle(processor) for processor in processors)
        and (holder is None or not holder.has_tracked_requests())
    )


def _is_plain_greedy(metadata: SamplingMetadata) -> bool:
    """Whether every token is the argmax of unprocessed logits, and no more is asked."""
    return metadata.all_greedy and _needs_logits_only(
        metadata, metadata.logitsprocs.non_argmax_invariant
    )


def _depends_on_own_row_only(metadata: SamplingMetadata) -> bool:
    """Whether a token can be sampled from its logits without the rest of the batch."""
    return metadata.all_random and _needs_logits_only(
        metadata, metadata.logitsprocs.all
    )


def _rows_of(metadata: SamplingMetadata, rows: list[int]) -> SamplingMetadata:
    """The metadata of some requests, where `_depends_on_own_row_only`."""

    def pick(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows]

    generators = metadata.generators
    return replace(
        metadata,
        temperature=pick(metadata.temperature),
        top_p=pick(metadata.top_p),
        top_k=pick(metadata.top_k),
        generators={
            place: generators[row]
            for place, row in enumerate(rows)
            if row in generators
        },
        spec_token_ids=[[] for _ in rows],
        output_token_ids=[[] for _ in rows],
    )


def _is_idle(processor: Any) -> bool:
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    return False


def _walk_by_level(
    runner: Any, walk: TreeWalk, logits: torch.Tensor, metadata: SamplingMetadata
) -> list[LogprobsTensors | None]:
    if _depends_on_own_row_only(metadata):
        _walk_alone(runner, walk, logits, metadata)
        return [None]
    request_ids = runner.input_batch.req_ids
    histories = [runner.requests[r].output_token_ids for r in request_ids]
    lengths = [len(history) for history in histories]
    # Tree rows are no linear history; each level's history is in the lists instead.
    metadata = replace(metadata, spec_token_ids=[[] for _ in request_ids])
    generators = metadata.generators
    logprobs = []
    try:
        while True:
            rows = torch.from_numpy(walk.logit_rows).to(logits.device)
            output = runner.sampler(logits=logits[rows], sampling_metadata=metadata)
            logprobs.append(output.logprobs_tensors)
            picked = output.sampled_token_ids[:, 0].cpu().numpy()
            if not walk.descend(picked):
                return logprobs
            active = np.flatnonzero(walk.active).tolist()
            for index in active:
                histories[index].append(int(picked[index]))
            # One draw per emitted token: walks that ended must not advance theirs.
            metadata = replace(
                metadata,
                generators={i: generators[i] for i in active if i in generators},
            )
            for processor in metadata.logitsprocs.all:
                processor.update_state(None)
    finally:
        # vLLM's bookkeeping will append the tokens itself.
        for history, length in zip(histories, lengths, strict=True):
            del history[length:]


def _walk_alone(
    runner: Any, walk: TreeWalk, logits: torch.Tensor, metadata: SamplingMetadata
) -> None:
    """Deeper levels sample only for the requests whose walks go on."""
    rows = torch.from_numpy(walk.logit_rows).to(logits.device)
    output = runner.sampler(logits=logits[rows], sampling_metadata=metadata)
    picked = output.sampled_token_ids[:, 0].cpu().numpy()
    while walk.descend(picked):
        active = np.flatnonzero(walk.active)
        rows = torch.from_numpy(walk.logit_rows[active]).to(logits.device)
        output = runner.sampler(
            logits=logits[rows], sampling_metadata=_rows_of(metadata, active.tolist())
        )
        picked = np.zeros(len(walk.active), dtype=np.int64)
        picked[active] = output.sampled_token_ids[:, 0].cpu().numpy()


def _stack(levels: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """[B, ...] per level to [B * levels, ...], request by request."""
    tensors = [level for level in levels if level is not None]
    if len(tensors) <= 1:
        return tensors[0] if tensors else None

    def merge(name: str) -> torch.Tensor:
        return torch.stack([getattr(t, name) for t in tensors], dim=1).flatten(0, 1)

    return LogprobsTensors(
        merge("logprob_token_ids"), merge("logprobs"), merge("selected_token_ranks")
    )
