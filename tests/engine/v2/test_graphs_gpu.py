"""CUDA graphs and compiled models: the same tokens, no step outside the graphs.

The other tests of V2 run without either. Here the demo model is compiled and captured
as a user's is, in float32, where plain vLLM's tokens are the measure.
"""

from __future__ import annotations

import pytest

from tests.engine.conftest import DEMO, DEMO_PPD, GREEDY
from tests.engine.engine_process import ON_GPU

pytestmark = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")

CAPTURED = {"enforce_eager": False, "max_num_seqs": 32, "enable_prefix_caching": False}
LONG = {**GREEDY, "max_tokens": 160}


@pytest.fixture(scope="module")
def plain_engine():
    return {**DEMO, **CAPTURED}


@pytest.fixture(scope="module")
def ppd_engine(plain_engine):
    """With the folder's own menu."""
    return {**plain_engine, "speculative_config": DEMO_PPD}


@pytest.fixture(autouse=True)
def within_the_graphs(ppd, ppd_engine):
    """All entries of the menu are served, the larger ones at small loads."""
    ppd.call("draft_within", ppd_engine, max_step_rows=256)


@pytest.fixture(scope="module")
def starts(texts):
    """Beginnings of held-out texts, of different lengths."""
    return [text[: 60 + 12 * (i % 9)] for i, text in enumerate(texts[:48])]


@pytest.mark.parametrize("batch", [1, 3, 8, 29])
def test_same_tokens_from_graphs(check, starts, batch):
    assert check(starts[-batch:], LONG)[2] > 0


def test_same_seeded_samples_from_graphs(check, starts):
    sampled = {**LONG, "temperature": 0.9, "top_p": 0.95}
    check(starts[:6], [{**sampled, "seed": i} for i in range(6)])


def test_a_thousand_steps_stay_on_the_graphs(ppd, ppd_engine, starts):
    """Steps of trees alone replay full graphs; nothing is compiled any more."""
    # Each round has the loads 8 to 1, since requests end one by one.
    params = [{**GREEDY, "max_tokens": 40 + 40 * i} for i in range(8)]
    what = {"prompts": starts[:8], "params": params, "steps": 1000}
    seen = ppd.call("v2.graph_use:graph_use", ppd_engine, **what)
    assert seen["steps"] >= 1000
    assert seen["compiled"] == []
    assert seen["decoding"].keys() == {"FULL"}
    # Steps that read prompts are of any shape: they run in captured pieces.
    assert seen["reading"].keys() <= {"PIECEWISE", "FULL"}
