"""Earlier matches on the device, against the pure core's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS
from vllm_ppd.kernels.ngram import match_ngrams_reference
from vllm_ppd.trees.ngram import match_ngrams


@pytest.fixture(params=IMPLEMENTATIONS)
def match(request):
    if request.param == "reference":
        return match_ngrams_reference
    from vllm_ppd.kernels.triton.ngram import match_ngrams

    return match_ngrams


def check(match, token_ids: np.ndarray, ends: np.ndarray, slots, context: int) -> list:
    want = match_ngrams(token_ids[slots], ends[slots], context)
    got = match(
        torch.from_numpy(token_ids).int().to(DEVICE),
        torch.tensor(slots, device=DEVICE),
        torch.from_numpy(ends).int().to(DEVICE),
        context,
    )
    assert got[0].tolist() == want[0].tolist()
    assert got[1].tolist() == want[1].tolist()
    return got[0].tolist()


def test_matches_that_can_be_seen(match):
    token_ids = np.array(
        [
            [1, 2, 3, 4, 5, 9, 1, 2, 3, 0],  # 1 2 3 came before
            [7, 8, 5, 7, 8, 6, 7, 8, 0, 0],  # 7 8 came twice: the first time counts
            [1, 2, 3, 4, 5, 6, 7, 8, 0, 0],  # nothing came before
            [1, 2, 3, 4, 5, 6, 7, 8, 1, 9],  # one token is no match
            [4, 4, 4, 4, 4, 4, 0, 0, 0, 0],  # overlaps itself
            [3, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # a single token
        ]
    )
    ends = np.array([9, 8, 8, 9, 6, 1])
    classes = check(match, token_ids, ends, [0, 1, 2, 3, 4, 5], 4096)
    assert classes == [1, 1, 0, 0, 2, 0]


def test_slots_in_any_order_and_a_window_that_is_short(match):
    generator = np.random.default_rng(0)
    token_ids = generator.integers(0, 3, (6, 40))
    ends = generator.integers(1, 41, 6)
    for context in (4096, 40, 17, 8, 2, 1):
        check(match, token_ids, ends, [4, 0, 5, 2], context)


def test_long_contexts(match):
    generator = np.random.default_rng(1)
    token_ids = generator.integers(0, 9, (4, 5000))
    ends = np.array([5000, 4097, 2049, 1024])
    token_ids[0, 4990:5000] = token_ids[0, 950:960]
    classes = check(match, token_ids, ends, [0, 1, 2, 3], 4096)
    assert classes[0] == 2
