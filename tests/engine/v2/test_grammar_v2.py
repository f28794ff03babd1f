"""Grammars and bad words on V2, with the demo model, whose drafts are often right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import DEMO, DEMO_PPD, same
from tests.engine.v2.engine import V2EngineProcess

ENGINE = {
    **DEMO,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
}


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
def test_grammars_and_bad_words(start, plain, ppd, trees, asynchronous):
    texts, params = requests()
    expected = plain.generate(ENGINE, texts, params)
    assert expected[0]["text"][0].startswith("self.")
    process = ppd if asynchronous else start(V2EngineProcess)
    engine = {**ENGINE, "speculative_config": {**DEMO_PPD, "tree": trees["wide"]}}
    same(expected, process.generate(engine, texts, params))
    before = process.accepted(engine)
    # Alone, a grammar's own drafts show: only scheduling ahead keeps them all.
    same(expected[:1], process.generate(engine, texts[:1], params[:1]))
    assert process.accepted(engine) > before or not asynchronous
