from __future__ import annotations

import pytest

from vllm_ppd.config import PPDConfig
from vllm_ppd.engine.refusals import require_supported_vllm


@pytest.mark.parametrize(
    ("speculative", "selected"),
    [
        (None, False),
        ({}, False),
        ({"method": "ngram"}, False),
        ({"method": "ppd"}, True),
        ({"method": "ppd", "model": "x"}, True),
        ({"model": "ppd:x"}, True),
        ({"model": "ppd"}, True),
        ({"model": "x"}, False),
        ({"method": "eagle", "model": "ppd:x"}, False),
    ],
)
def test_selection(speculative, selected):
    assert PPDConfig.selected_by(speculative) is selected


def test_all_spellings_mean_the_same():
    a = PPDConfig.from_speculative({"method": "ppd", "model": "x/y"})
    b = PPDConfig.from_speculative({"model": "ppd:x/y"})
    c = PPDConfig.from_speculative({"method": "ppd", "model": "ppd:x/y"})
    assert a == b == c == PPDConfig("x/y")
    d = PPDConfig.from_speculative({"model": "ppd:x", "num-speculative-tokens": 7})
    assert d.num_speculative_tokens == 7
    # Without a path.
    e, f = ({"method": "ppd"}, {"method": "ppd", "model": None})
    for spelling in (e, f, {"model": "ppd"}):
        assert PPDConfig.from_speculative(spelling) == PPDConfig(None)
    assert PPDConfig.from_speculative({**e, "model": "ppd"}) == PPDConfig("ppd")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1"])
def test_supported_vllm(version):
    require_supported_vllm(version)
