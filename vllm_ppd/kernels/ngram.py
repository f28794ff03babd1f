"""N-gram matches on the device: the torch reference.

The matches are those of `vllm_ppd.trees.ngram.match_ngrams`, for requests whose tokens
lie in vLLM's table of slots. Nothing is read on the host.
"""

from __future__ import annotations

import torch

from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS

__all__ = ["match_ngrams_reference"]

_LONGEST = LENGTHS[-1][1]


def match_ngrams_reference(
    token_ids: torch.Tensor,  # int [slots, length]: tokens of each slot's request
    slots: torch.Tensor,  # int [B]: slot of each request
    ends: torch.Tensor,  # int [slots]: number of tokens of a slot's request
    context: int,  # number of last tokens of a request that are searched
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [B] match classes and int32 [B, MAX_NGRAM_DRAFTS] drafts, -1 padded."""
    slots = slots.long()
    width = min(context, token_ids.shape[1])
    count = ends[slots].long().clamp(max=width)[:, None]
    position = torch.arange(width, device=token_ids.device)
    first = ends[slots].long()[:, None] - count
    columns = (first + position).clamp(max=token_ids.shape[1] - 1)
    tokens = token_ids[slots[:, None], columns]

    # A position matches while the tokens before it equal those before the end.
    matches = (position >= 1) & (position < count)
    longest, match_end = torch.zeros_like(count), torch.zeros_like(count)
    for length in range(1, _LONGEST + 1):
        earlier = torch.nn.functional.pad(tokens, (length, 0))[:, :width]
        last = tokens.gather(1, (count - length).clamp(min=0))
        matches = matches & (position >= length) & (count > length) & (earlier == last)
        any_match = matches.any(1, keepdim=True)
        longest = torch.where(any_match, length, longest)
        earliest = matches.int().argmax(1, keepdim=True)
        match_end = torch.where(any_match, earliest, match_end)

    classes = torch.zeros_like(longest)
    for match_class, (low, high) in enumerate(LENGTHS, start=1):
        inside = (low <= longest) & (longest <= high)
        classes = torch.where(inside, match_class, classes)
    ahead = match_end + torch.arange(MAX_NGRAM_DRAFTS, device=token_ids.device)
    drafts = tokens.gather(1, ahead.clamp(max=width - 1))
    drafts = torch.where((classes > 0) & (ahead < count), drafts, -1)
    return classes[:, 0].int(), drafts.int()
