"""After any step the KV cache holds what plain decoding would have written."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.conftest import cpu_only, engine_with

pytestmark = cpu_only


@pytest.mark.parametrize("tree", [None, "wide"])
@pytest.mark.parametrize("tokens", [40, 95])
def test_kv_of_the_accepted_context_equals_plain_decodings(
    plain, ppd, plain_engine, ppd_engine, texts, trees, tree, tokens
):
    engine = engine_with(ppd_engine, tree=trees[tree]) if tree else ppd_engine
    arguments = {
        "prompt": texts[7][:500],
        # Sampling takes other branches than the likeliest, so entries must move.
        "params": {"temperature": 0.8, "seed": 3, "max_tokens": 200},
    }
    actual = ppd.call("kv_of_context", engine, tokens=tokens, **arguments)
    # PPD may emit a few tokens more than asked for in its last step.
    arguments["tokens"] = len(actual["ids"])
    expected = plain.call("kv_of_context", plain_engine, **arguments)
    assert actual["ids"] == expected["ids"]
    layers = zip(expected["layers"], actual["layers"], strict=True)
    for layer, (a, b) in enumerate(layers):
        for name, x, y in zip(("keys", "values"), a, b, strict=True):
            np.testing.assert_allclose(
                y, x, rtol=1e-3, atol=1e-4, err_msg=f"{name} of layer {layer}"
            )
