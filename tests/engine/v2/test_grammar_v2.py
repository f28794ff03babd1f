"""Grammars and bad words on V2, with the demo model, whose drafts are often right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import MODEL, PROMPTS
from tests.engine.engine_process import GPU_MEMORY
from tests.engine.v2.conftest import same
from tests.engine.v2.engine import V2EngineProcess


@pytest.fixture(scope="module")
def demo_engine() -> dict[str, Any]:
    return {
        "model": str(MODEL),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "seed": 0,
        "disable_log_stats": False,
        **GPU_MEMORY,
    }


@pytest.fixture(scope="module")
def demo_ppd(demo_engine: dict[str, Any], trees: dict[str, str]) -> dict[str, Any]:
    speculative = {"method": "ppd", "model": str(PROMPTS), "tree": trees["wide"]}
    return {**demo_engine, "speculative_config": speculative}


def requests() -> tuple[list[str], list[dict[str, Any]]]:
    """Grammars beside requests that have none, greedy and sampled."""
    from vllm.sampling_params import StructuredOutputsParams

    call = StructuredOutputsParams(regex=r"self\.[a-z_]{3,20}\([a-z_, ]{1,30}\)\n")
    digits = StructuredOutputsParams(regex=r"\[(\d{1,2}, ){5}\d\]")
    texts = ["class A:\n    def f(self):\n        ", "x = ", "def g(", "import os\n"]
    params = [
        {"temperature": 0.0, "structured_outputs": call},
        {"temperature": 1.0, "seed": 5, "structured_outputs": digits},
        {"temperature": 0.0, "bad_words": ["self", " name", "import os"]},
        {"temperature": 0.0},
    ]
    return texts, [{**p, "max_tokens": 12} for p in params]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_grammars_and_bad_words(plain, ppd, demo_engine, demo_ppd, asynchronous):
    texts, params = requests()
    expected = plain.generate(demo_engine, texts, params)
    assert expected[0]["text"][0].startswith("self.")
    process = ppd if asynchronous else V2EngineProcess()
    try:
        same(expected, process.generate(demo_ppd, texts, params))
        before = process.accepted(demo_ppd)
        # Alone, a grammar's own drafts show: only scheduling ahead keeps them all.
        same(expected[:1], process.generate(demo_ppd, texts[:1], params[:1]))
        assert process.accepted(demo_ppd) > before or not asynchronous
    finally:
        if not asynchronous:
            process.stop()
