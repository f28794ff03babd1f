"""A bigram table from the frozen model's own next-token distributions."""

from __future__ import annotations

import torch
from tqdm import tqdm

from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.trees.bigram import BigramCounts, BigramTable

__all__ = ["count_successors"]

_WINDOW = 256
# Likeliest next tokens that count at each position.
_KEPT = 16
_ROWS_AT_ONCE = 1 << 11


@torch.no_grad()
def count_successors(
    model: FrozenModel,
    stream: TokenStream,
    size: int,
    num_prompt_tokens: int,
    quiet: bool = True,
) -> BigramTable:
    """The `size` likeliest bigram of each token, over all of `stream`."""
    counts = BigramCounts(model.vocab_size)
    window = min(_WINDOW, stream.tokens.numel())
    starts = torch.arange(0, stream.tokens.numel() - window + 1, window)
    batch = max(1, _ROWS_AT_ONCE // window)
    kept = min(_KEPT, model.vocab_size)
    with tqdm(
        total=len(starts) * window, unit="tok", desc="bigram", disable=quiet
    ) as bar:
        for part in starts.split(batch):
            tokens, _ = stream.windows(part, window)
            hidden = model.model.base_model(tokens.to(model.device), use_cache=False)
            logits = model.logits(hidden.last_hidden_state.flatten(0, 1))
            best = logits.softmax(dim=1).topk(kept, dim=1)
            parents = tokens.flatten().repeat_interleave(kept)
            counts.add(
                parents.numpy(),
                best.indices.flatten().cpu().numpy(),
                best.values.flatten().double().cpu().numpy(),
            )
            bar.update(tokens.numel())
    return counts.table(size, num_prompt_tokens)
