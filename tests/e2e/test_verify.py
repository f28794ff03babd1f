"""``vllm-ppd verify`` with real engines, healthy and broken."""

from __future__ import annotations

import os
from functools import partial

from tests.engine.conftest import MODEL, PROMPTS
from vllm_ppd.cli import main, verify
from vllm_ppd.cli.engines import Engine


class BlindEngine(Engine):
    """Rows of its trees see the root alone."""

    def start(self) -> str:
        # The worker in this process has what is patched here, after its canary.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        dtype = super().start()
        from vllm_ppd.engine.v1.step_trees import StepTrees

        place = StepTrees.place

        def blind(*args):
            trees = place(*args)
            trees.layout["ancestors"].fill_(1)
            return trees

        StepTrees.place = blind
        return dtype


def test_wrong_attention_is_found(monkeypatch, capsys):
    argv = ["verify", str(MODEL), str(PROMPTS), "--samples", "4"]
    argv += ["--engine", "enforce_eager=true"]
    kept, answer = {}, verify.answer

    def remembered(name, *args):
        kept[name] = kept.get(name) or answer(name, *args)
        return kept[name]

    monkeypatch.setattr(verify, "answer", remembered)
    assert main.main(argv) == 0
    assert "'greedy, 8 at once': 192" in capsys.readouterr().out
    del kept["vLLM with PPD"]
    blind = partial(verify.EngineProcess, engine_class=BlindEngine)
    monkeypatch.setattr(verify, "EngineProcess", blind)
    assert main.main(argv) == 1
    assert "greedy, 1 at once, answer 1, token " in capsys.readouterr().out
