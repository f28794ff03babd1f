"""CUDA graphs and compiled models: the same tokens, no step outside the graphs.

The other tests of V2 run without either. Here the demo model is compiled and captured
as a user's is, in float32, where plain vLLM's tokens are the measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import MODEL, PROMPTS
from tests.engine.engine_process import GPU_MEMORY, ON_GPU
from tests.engine.v2.engine import V2EngineProcess
from tests.engine.v2.test_exactness_v2 import same

pytestmark = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")

ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
    "seed": 0,
    "disable_log_stats": False,
    **GPU_MEMORY,
}
SPECULATIVE = {"method": "ppd", "model": str(PROMPTS), "profile": "none"}
# Trees by load: of how many rows is up to the default plan.
PPD = {**ENGINE, "speculative_config": SPECULATIVE}
GREEDY = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True}


@pytest.fixture(scope="module")
def compiled() -> Iterator[V2EngineProcess]:
    process = V2EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def compiled_ppd() -> Iterator[V2EngineProcess]:
    process = V2EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def starts(texts: list[str]) -> list[str]:
    """Beginnings of held-out texts, of different lengths."""
    return [text[: 60 + 12 * (i % 9)] for i, text in enumerate(texts[:48])]


@pytest.mark.parametrize("batch", [1, 3, 8, 29])
def test_same_tokens_from_graphs(compiled, compiled_ppd, starts, batch):
    prompts = starts[-batch:]
    expected = compiled.generate(ENGINE, prompts, GREEDY)
    before = compiled_ppd.accepted(PPD)
    same(expected, compiled_ppd.generate(PPD, prompts, GREEDY))
    assert compiled_ppd.accepted(PPD) > before


def test_same_seeded_samples_from_graphs(compiled, compiled_ppd, starts):
    params = [
        {**GREEDY, "temperature": 0.9, "top_p": 0.95, "seed": i} for i in range(6)
    ]
    expected = compiled.generate(ENGINE, starts[:6], params)
    same(expected, compiled_ppd.generate(PPD, starts[:6], params))


def test_a_thousand_steps_stay_on_the_graphs(compiled_ppd, starts):
    """Steps of trees alone replay full graphs; nothing is compiled any more."""
    # Each round has the loads 8 to 1, since requests end one by one.
    params = [{**GREEDY, "max_tokens": 40 + 40 * i} for i in range(8)]
    found = compiled_ppd.call(
        "graph_use", PPD, prompts=starts[:8], params=params, steps=1000
    )
    assert found["steps"] >= 1000
    assert found["compiled"] == []
    assert found["decoding"].keys() == {"FULL"}
    # Steps that read prompts are of any shape: they run in captured pieces.
    assert found["reading"].keys() <= {"PIECEWISE", "FULL"}
