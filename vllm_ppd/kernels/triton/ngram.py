"""Earlier matches of every request's last tokens: one program per request.

A program looks at every position of the context once. Of those before which the most
tokens match the context's last ones, it keeps the earliest; the pair is one number,
(length, distance from the context's end), so that a maximum finds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS

__all__ = ["match_ngrams"]

_LONGEST = LENGTHS[-1][1]
_BLOCK = 1024


@triton.jit
def _match_ngrams_kernel(
    tokens_ptr,  # [slots, length]
    tokens_stride,
    slots_ptr,  # [B]
    ends_ptr,  # [slots]
    classes_ptr,  # int32 [B]
    ngrams_ptr,  # int32 [B, CHAIN]
    context,
    LOW: tl.constexpr,  # tuples: lengths of each class
    HIGH: tl.constexpr,
    LONGEST: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    end = tl.load(ends_ptr + slot).to(tl.int32)
    count = tl.minimum(end, context)
    tokens = tokens_ptr + slot * tokens_stride + (end - count)

    best = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(1, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        alive = at < count
        run = tl.zeros([BLOCK], dtype=tl.int32)
        for length in tl.static_range(1, LONGEST + 1):
            last = tl.load(tokens + tl.maximum(count - length, 0))
            alive = alive & (at >= length)
            before = tl.load(tokens + at - length, mask=alive, other=-1)
            alive = alive & (before == last)
            run += alive.to(tl.int32)
        # Longer first, and of equally long ones the one farthest from the end.
        score = run.to(tl.int64) * 2147483648 + (count - at).to(tl.int64)
        best = tl.maximum(best, tl.where(run > 0, score, 0))
    top = tl.max(best, axis=0)
    longest = (top // 2147483648).to(tl.int32)
    found = count - (top % 2147483648).to(tl.int32)

    match_class = tl.zeros_like(longest)
    for index in tl.static_range(len(LOW)):
        inside = (longest >= LOW[index]) & (longest <= HIGH[index])
        match_class += inside.to(tl.int32) * (index + 1)
    tl.store(classes_ptr + request, match_class)
    ahead = found + tl.arange(0, CHAIN)
    there = ahead < tl.where(match_class > 0, count, 0)
    chain = tl.load(tokens + ahead, mask=there, other=-1)
    ngram_at = ngrams_ptr + request * CHAIN + tl.arange(0, CHAIN)
    tl.store(ngram_at, tl.where(there, chain, -1))


def match_ngrams(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    ends: torch.Tensor,
    context: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`vllm_ppd.kernels.ngram.match_ngrams_reference`."""
    batch = len(slots)
    classes = torch.empty(batch, dtype=torch.int32, device=slots.device)
    ngrams = classes.new_empty((batch, MAX_NGRAM_DRAFTS))
    if batch:
        _match_ngrams_kernel[(batch,)](
            token_ids,
            token_ids.stride(0),
            slots,
            ends,
            classes,
            ngrams,
            context,
            LOW=tuple(low for low, _ in LENGTHS),
            HIGH=tuple(high for _, high in LENGTHS),
            LONGEST=_LONGEST,
            CHAIN=triton.next_power_of_2(MAX_NGRAM_DRAFTS),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return classes, ngrams
