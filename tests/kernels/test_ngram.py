"""N-gram matches of Triton and C++, against the core's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, kernels, needs_compiler, needs_triton
from vllm_ppd.kernels.cpu.tree_walk import match_ngrams_cpu
from vllm_ppd.trees.ngram import match_ngrams


def compiled(token_ids, ends, slots, context):
    """The forms of a match are called with numpy arrays."""
    token_ids, ends = token_ids.astype(np.int32)[slots], ends.astype(np.int32)[slots]
    return match_ngrams_cpu(token_ids, ends, context)


def triton(token_ids, ends, slots, context):
    return kernels.ngram.match_ngrams(
        torch.from_numpy(token_ids).int().to(DEVICE),
        torch.tensor(slots, device=DEVICE),
        torch.from_numpy(ends).int().to(DEVICE),
        context,
    )


@pytest.fixture(
    params=[
        pytest.param(compiled, marks=needs_compiler),
        pytest.param(triton, marks=needs_triton),
    ]
)
def match(request):
    return request.param


def check(match, token_ids: np.ndarray, ends: np.ndarray, slots, context: int) -> list:
    want = match_ngrams(token_ids[slots], ends[slots], context)
    got = match(token_ids, ends, slots, context)
    assert got[0].tolist() == want[0].tolist()
    assert got[1].tolist() == want[1].tolist()
    return got[0].tolist()


def test_slots_in_any_order_and_a_window_that_is_short(match):
    rng = np.random.default_rng(0)
    for context in (4096, 40, 17, 8, 2, 1):
        for vocabulary in (2, 3, 5) * 8 if match is compiled else (3,):
            token_ids = rng.integers(0, vocabulary, (12, 40))
            ends = rng.integers(1, 41, 12)
            check(match, token_ids, ends, rng.permutation(12)[:9], context)


def test_long_contexts(match):
    rng = np.random.default_rng(1)
    token_ids = rng.integers(0, 9, (4, 5000))
    ends = np.array([5000, 4097, 2049, 1024])
    token_ids[0, 4990:5000] = token_ids[0, 950:960]
    classes = check(match, token_ids, ends, [0, 1, 2, 3], 4096)
    assert classes[0] == 2
