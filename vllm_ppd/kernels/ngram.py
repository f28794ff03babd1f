"""Earlier matches on the device, the torch reference: what came after them.

The same as ``vllm_ppd.trees.ngram.match_ngrams`` for requests whose tokens lie in vLLM's
table of slots. No value is read on the host.
"""

from __future__ import annotations

import torch

from vllm_ppd.trees.ngram import LENGTHS, MAX_NGRAM_DRAFTS

__all__ = ["match_ngrams_reference"]

_LONGEST = LENGTHS[-1][1]


def match_ngrams_reference(
    token_ids: torch.Tensor,  # int [slots, length]: tokens of each slot's request
    slots: torch.Tensor,  # int [B]: slot of each request
    ends: torch.Tensor,  # int [slots]: how many tokens a slot's request has
    context: int,  # most tokens of a request that are looked at, its last ones
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [B] match classes and int32 [B, MAX_NGRAM_DRAFTS] ngrams, -1 padded."""
    slots = slots.long()
    width = min(context, token_ids.shape[1])
    count = ends[slots].long().clamp(max=width)[:, None]  # n tokens are looked at
    at = torch.arange(width, device=token_ids.device)
    first = ends[slots].long()[:, None] - count
    tokens = token_ids[slots[:, None], (first + at).clamp(max=token_ids.shape[1] - 1)]

    # Position e is alive while the tokens before it match those before the end.
    alive = (at >= 1) & (at < count)
    longest, found = torch.zeros_like(count), torch.zeros_like(count)
    for length in range(1, _LONGEST + 1):
        before = torch.nn.functional.pad(tokens, (length, 0))[:, :width]
        last = tokens.gather(1, (count - length).clamp(min=0))
        alive = alive & (at >= length) & (count > length) & (before == last)
        some = alive.any(1, keepdim=True)
        longest = torch.where(some, length, longest)
        found = torch.where(some, alive.int().argmax(1, keepdim=True), found)

    classes = torch.zeros_like(longest)
    for match_class, (low, high) in enumerate(LENGTHS, start=1):
        inside = (low <= longest) & (longest <= high)
        classes = torch.where(inside, match_class, classes)
    ahead = found + torch.arange(MAX_NGRAM_DRAFTS, device=token_ids.device)
    ngrams = tokens.gather(1, ahead.clamp(max=width - 1))
    ngrams = torch.where((classes > 0) & (ahead < count), ngrams, -1)
    return classes[:, 0].int(), ngrams.int()
