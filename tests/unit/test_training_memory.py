"""A 7B model with a vocabulary of 128k trains on one 40 GB card: the arithmetic.

The real forward pass runs on PyTorch's meta device, which computes shapes alone, so
what it keeps for the backward pass can be counted without holding it. There attention
is unfused and in float32, the most that any kernel keeps.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from vllm_ppd.train.insertion import Insertion
from vllm_ppd.train.loss import Targets, prompt_loss
from vllm_ppd.train.model import FrozenModel, OrdinaryRows

GB = 10**9
BATCH, LENGTH, POINTS, TOKENS = 8, 1024, 32, 3
VOCAB, HIDDEN, LAYERS, INNER = 128_256, 4096, 32, 11_008
ROWS = BATCH * POINTS * TOKENS


@pytest.fixture(scope="module")
def footprint() -> SimpleNamespace:
    """Bytes of weights, of the cache and, by (shape, dtype), of what the backward pass
    needs."""
    # The other sizes are the configuration's defaults.
    config = transformers.LlamaConfig(vocab_size=VOCAB)
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    # Its checks compare numbers, which there are none of.
    model = FrozenModel.__new__(FrozenModel)
    model.model, model.config = llama.eval().requires_grad_(False), config
    points = torch.arange(POINTS, device="meta").expand(BATCH, -1)
    insertion = Insertion(points, torch.ones_like(points).bool(), LENGTH, TOKENS, 1)
    cache = transformers.DynamicCache()
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    with torch.no_grad():
        hidden = llama.base_model(ids, past_key_values=cache).last_hidden_state
    table = torch.zeros(TOKENS, 1, HIDDEN, device="meta", requires_grad=True)
    frozen = {tensor.untyped_storage()._cdata for tensor in llama.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in frozen:
            kept.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.prompt_rows(table, insertion, OrdinaryRows(hidden, cache))
    saved: dict[tuple, int] = {}
    for tensor in kept.values():
        key = (tuple(tensor.shape), tensor.dtype)
        saved[key] = saved.get(key, 0) + tensor.untyped_storage().nbytes()
    keys = [layer.keys for layer in cache.layers]
    return SimpleNamespace(
        weights=sum(p.numel() * p.element_size() for p in llama.parameters()),
        cache=2 * sum(k.numel() * k.element_size() for k in keys),
        saved=saved,
    )


def test_it_fits_with_any_attention(footprint) -> None:
    saved = sum(footprint.saved.values())
    assert footprint.weights == pytest.approx(15.06 * GB, rel=0.01)
    assert footprint.cache == pytest.approx(4.70 * GB, rel=0.01)
    assert saved == pytest.approx(15.8 * GB, rel=0.02)
    # Besides: chunks of logits, and what an ordinary layer holds while it runs.
    ordinary = BATCH * LENGTH * (3 * INNER + 4 * HIDDEN) * 2
    assert footprint.weights + footprint.cache + saved + ordinary < 38 * GB


def test_a_prompt_row_outside_attention(footprint) -> None:
    """What the documentation counts: two norms in float32, three inner activations."""
    norms = footprint.saved[((BATCH, POINTS * TOKENS, HIDDEN), torch.float32)]
    inner = footprint.saved[((BATCH, POINTS * TOKENS, INNER), torch.bfloat16)]
    assert norms == (2 * LAYERS + 1) * ROWS * HIDDEN * 4
    assert inner == 3 * LAYERS * ROWS * INNER * 2


def test_only_prompt_rows_are_kept(footprint) -> None:
    """Nothing as long as the sequence but keys and values (and their float32)."""
    for shape, _ in footprint.saved:
        if LENGTH + POINTS * TOKENS in shape:
            assert 128 in shape or POINTS * TOKENS in shape, shape
        else:
            assert LENGTH not in shape, shape


@pytest.mark.parametrize("ept", [1, 4])
def test_logits_are_held_a_chunk_at_a_time(ept: int) -> None:
    """All of them would be 768 rows of 128,256 numbers, several times over."""
    vocabulary, limit, sizes = 1000, 20_000, []
    weight = torch.randn(vocabulary, 16)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.T
        sizes.append(logits.numel())
        return logits

    rows = torch.randn(64, TOKENS, ept, 16, requires_grad=True)
    targets = Targets(torch.randn(64, TOKENS, 16), torch.zeros(64, TOKENS).long())
    loss, _ = prompt_loss(rows, targets, head, alpha=0.8, chunk_elements=limit)
    loss.backward()
    assert max(sizes) <= limit
    assert sum(sizes) >= 64 * TOKENS * (ept + 1) * vocabulary
