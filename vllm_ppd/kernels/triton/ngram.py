"""N-gram matches of every request's last tokens in Triton: one program per request.

The matches are those of `vllm_ppd.trees.ngram.match_ngrams`, for requests whose tokens
lie in vLLM's table of slots. A program reads every position of the context once. It
keeps the position before which the most tokens match the last ones, and of equally long
matches the earliest: both are packed into one number, (length, distance from the end),
so that a maximum finds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS

_BLOCK = 1024


@triton.jit
def _match_ngrams_kernel(
    tokens_ptr,  # [slots, length]
    tokens_stride,
    slots_ptr,  # [B]
    ends_ptr,  # [slots]
    classes_ptr,  # int32 [B]
    drafts_ptr,  # int32 [B, DRAFTS]
    context,
    LOW: tl.constexpr,  # tuples: lengths of each class
    HIGH: tl.constexpr,
    LONGEST: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    end = tl.load(ends_ptr + slot).to(tl.int32)
    count = tl.minimum(end, context)
    tokens = tokens_ptr + slot * tokens_stride + (end - count)

    best = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(1, count, BLOCK):
        position = first + tl.arange(0, BLOCK)
        matches = position < count
        run = tl.zeros([BLOCK], dtype=tl.int32)
        for length in tl.static_range(1, LONGEST + 1):
            last = tl.load(tokens + tl.maximum(count - length, 0))
            matches = matches & (position >= length)
            earlier = tl.load(tokens + position - length, mask=matches, other=-1)
            matches = matches & (earlier == last)
            run += matches.to(tl.int32)
        # Longer first, and of equally long ones the one farthest from the end.
        score = run.to(tl.int64) * 2147483648 + (count - position).to(tl.int64)
        best = tl.maximum(best, tl.where(run > 0, score, 0))
    top = tl.max(best, axis=0)
    longest = (top // 2147483648).to(tl.int32)
    match_end = count - (top % 2147483648).to(tl.int32)

    match_class = tl.zeros_like(longest)
    for index in tl.static_range(len(LOW)):
        inside = (longest >= LOW[index]) & (longest <= HIGH[index])
        match_class += inside.to(tl.int32) * (index + 1)
    tl.store(classes_ptr + request, match_class)
    offset = tl.arange(0, DRAFTS)
    inside = match_end + offset < tl.where(match_class > 0, count, 0)
    drafts = tl.load(tokens + match_end + offset, mask=inside, other=-1)
    drafts = tl.where(inside, drafts, -1)
    tl.store(drafts_ptr + request * DRAFTS + offset, drafts)


def match_ngrams(
    token_ids: torch.Tensor,  # int [slots, length]: tokens of each slot's request
    slots: torch.Tensor,  # int [B]: slot of each request
    ends: torch.Tensor,  # int [slots]: number of tokens of a slot's request
    context: int,  # number of last tokens of a request that are searched
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [B] match classes and int32 [B, MAX_NGRAM_DRAFTS] drafts, -1 padded."""
    batch = len(slots)
    classes = torch.empty(batch, dtype=torch.int32, device=slots.device)
    drafts = classes.new_empty((batch, MAX_NGRAM_DRAFTS))
    if batch:
        _match_ngrams_kernel[(batch,)](
            *(token_ids, token_ids.stride(0), slots, ends, classes, drafts, context),
            LOW=tuple(low for low, _ in LENGTHS),
            HIGH=tuple(high for _, high in LENGTHS),
            LONGEST=LENGTHS[-1][1],
            DRAFTS=MAX_NGRAM_DRAFTS,  # a power of two
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return classes, drafts
