"""CUDA graphs and compiled models: the same tokens, no step outside the graphs.

The other tests of V2 run without either. Here the demo model is compiled and captured
as a user's is, in float32, where plain vLLM's tokens are the measure.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.engine_process import ON_GPU
from tests.engine.v2.conftest import same

pytestmark = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")

CAPTURED = {"enforce_eager": False, "max_num_seqs": 32, "enable_prefix_caching": False}
GREEDY = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True}


@pytest.fixture(scope="module")
def captured(plain_engine: dict[str, Any]) -> dict[str, Any]:
    return {**plain_engine, **CAPTURED}


@pytest.fixture(scope="module")
def captured_ppd(ppd_engine: dict[str, Any]) -> dict[str, Any]:
    """With the folder's own menu."""
    return {**ppd_engine, **CAPTURED}


@pytest.fixture(autouse=True)
def within_the_graphs(ppd, captured_ppd):
    """All entries of the menu are served, the larger ones at small loads."""
    ppd.call("draft_within", captured_ppd, max_step_rows=256)


@pytest.fixture(scope="module")
def starts(texts: list[str]) -> list[str]:
    """Beginnings of held-out texts, of different lengths."""
    return [text[: 60 + 12 * (i % 9)] for i, text in enumerate(texts[:48])]


@pytest.mark.parametrize("batch", [1, 3, 8, 29])
def test_same_tokens_from_graphs(plain, ppd, captured, captured_ppd, starts, batch):
    prompts = starts[-batch:]
    expected = plain.generate(captured, prompts, GREEDY)
    before = ppd.accepted(captured_ppd)
    same(expected, ppd.generate(captured_ppd, prompts, GREEDY))
    assert ppd.accepted(captured_ppd) > before


def test_same_seeded_samples_from_graphs(plain, ppd, captured, captured_ppd, starts):
    params = [
        {**GREEDY, "temperature": 0.9, "top_p": 0.95, "seed": i} for i in range(6)
    ]
    expected = plain.generate(captured, starts[:6], params)
    same(expected, ppd.generate(captured_ppd, starts[:6], params))


def test_a_thousand_steps_stay_on_the_graphs(ppd, captured_ppd, starts):
    """Steps of trees alone replay full graphs; nothing is compiled any more."""
    # Each round has the loads 8 to 1, since requests end one by one.
    params = [{**GREEDY, "max_tokens": 40 + 40 * i} for i in range(8)]
    seen = ppd.call(
        "graph_use", captured_ppd, prompts=starts[:8], params=params, steps=1000
    )
    assert seen["steps"] >= 1000
    assert seen["compiled"] == []
    assert seen["decoding"].keys() == {"FULL"}
    # Steps that read prompts are of any shape: they run in captured pieces.
    assert seen["reading"].keys() <= {"PIECEWISE", "FULL"}
