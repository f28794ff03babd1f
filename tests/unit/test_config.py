from __future__ import annotations

import pytest

from vllm_ppd.config import PPDConfig, PPDConfigError
from vllm_ppd.engine.refusals import require_supported_vllm
from vllm_ppd.trees.tree import MAX_ROWS


@pytest.mark.parametrize(
    ("speculative", "selected"),
    [
        (None, False),
        ({}, False),
        ({"method": "ngram"}, False),
        ({"method": "ppd"}, True),
        ({"method": "ppd", "model": "x"}, True),
        ({"model": "ppd:x"}, True),
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


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"method": "ppd"}, "path is None; expected a folder or a hub id"),
        ({"method": "ppd", "model": ""}, "path is ''"),
        ({"model": "ppd:"}, "path is ''"),
        ({"model": "ppd:x", "num_speculative_tokens": 0}, "is 0; expected 1 to"),
        ({"model": "ppd:x", "num_speculative_tokens": -3}, "is -3; expected 1 to"),
        ({"model": "ppd:x", "num_speculative_tokens": MAX_ROWS}, "expected 1 to 128"),
        ({"model": "ppd:x", "num_speculative_tokens": "7"}, "is '7'; expected a whole"),
        ({"model": "ppd:x", "num_speculative_tokens": 2.5}, "is 2.5; expected a whole"),
        ({"model": "ppd:x", "num_speculative_tokens": True}, "expected a whole number"),
        ({"model": "ppd:x", "tree": 3}, "tree is 3; expected a file's path"),
        ({"model": "ppd:x", "ngram": "yes"}, "ngram is 'yes'; expected true or false"),
        ({"model": "ppd:x", "measure_seconds": 0}, "measure_seconds is 0; expected a"),
        ({"model": "ppd:x", "profile": ""}, "profile is ''; expected 'auto'"),
        ({"model": "ppd:x", "tre": "f"}, "'tre'.*did you mean 'tree'"),
        (
            {"model": "ppd:x", "quantization": "fp8"},
            "key 'quantization'; expected",
        ),
    ],
)
def test_bad_settings_are_refused(speculative, message):
    with pytest.raises(PPDConfigError, match=message):
        PPDConfig.from_speculative(speculative)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1"])
def test_supported_vllm(version):
    require_supported_vllm(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "dev"])
def test_unsupported_vllm_is_refused_by_name_and_remedy(version):
    with pytest.raises(PPDConfigError, match=f"this is vLLM {version}; install"):
        require_supported_vllm(version)
