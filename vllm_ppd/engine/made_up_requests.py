"""Requests that nobody made: what a model runner is given when it is measured."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)

from vllm_ppd.trees.tree import SparseTree

__all__ = ["blocks_of", "scheduled", "tree_of_rows"]


def tree_of_rows(rows: int, num_prompt_tokens: int, num_ept: int) -> SparseTree:
    """A tree of `rows` rows: about a third prompt rows, the rest a binary tree."""
    prompt_tokens = min((rows - 1) // (2 + num_ept), 4 * num_prompt_tokens)
    nodes = rows - prompt_tokens * num_ept
    parents = [child // 2 for child in range(nodes - 1)]
    ranks = [child % 2 for child in range(nodes - 1)]
    prompts = [0] * nodes
    for index in range(prompt_tokens):
        prompts[index % nodes] += 1
    return SparseTree(tuple(parents), tuple(ranks), tuple(prompts), num_ept)


def blocks_of(config: Any, index: int, tokens: int) -> tuple[list[int], ...]:
    """Blocks of a made-up request in each KV cache group; 0 is vLLM's null block.

    Args:
        config: vLLM's KVCacheConfig.
        index: of the request.
        tokens: most that it will have.
    """
    blocks = []
    for group in config.kv_cache_groups:
        count = -(-tokens // group.kv_cache_spec.block_size)
        # With too little cache requests share blocks: what they read is made up
        # anyway, and it takes as long.
        first = index * count
        free = config.num_blocks - 1
        blocks.append([1 + (first + i) % free for i in range(count)])
    return tuple(blocks)


def scheduled(
    new: list[NewRequestData] | None = None,
    cached: CachedRequestData | None = None,
    tokens: dict[str, int] | None = None,
    drafts: dict[str, list[int]] | None = None,
    finished: set[str] | None = None,
) -> SchedulerOutput:
    """A scheduler's output: new requests, running ones, and how many tokens of each."""
    tokens = tokens or {}
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = new or []
    if cached is not None:
        output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = tokens
    output.total_num_scheduled_tokens = sum(tokens.values())
    output.scheduled_spec_decode_tokens = drafts or {}
    output.finished_req_ids = finished or set()
    return output
