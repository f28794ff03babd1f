"""V2 learns the bigram table on the device, and drafts better by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.conftest import engine_with, same
from tests.engine.v2.conftest import GREEDY, prompts
from vllm_ppd.trees.bigram import BigramTable, OnlineBigram

WORDS = 12


def walk(paths: list[list[int]], lengths: list[int]) -> Any:
    """A step's verification; only what the learner reads."""
    return SimpleNamespace(
        paths=torch.tensor(paths, dtype=torch.int32),
        num_sampled=torch.tensor(lengths, dtype=torch.int32),
    )


def learnt(steps: int, seen: Any, tokens: list[int], firsts: list[int]) -> OnlineBigram:
    """A table after the same step several times: after u the target wants u + 1."""
    from vllm_ppd.engine.v2.bigram_learner import BigramLearner

    live = OnlineBigram.of(BigramTable.empty(WORDS, 4, (1.0,)))
    learner = BigramLearner(live, max_rows=8)
    # A prompt's rows lie before and between those that have logits.
    ids = torch.tensor([0, *(t for token in tokens for t in (token, 0))])
    rows = torch.arange(1, len(ids), 2)
    batch: Any = SimpleNamespace(
        cu_num_logits=torch.tensor(firsts), input_ids=ids, logits_indices=rows
    )
    logits = torch.zeros(len(tokens), WORDS)
    logits[torch.arange(len(tokens)), (ids[rows] + 1) % WORDS] = 50.0
    for _ in range(steps):
        learner.after_walk(seen, logits, batch)
    return live


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_ppd.engine.v2.bigram_learner.EVERY", 1)


def test_visited_nodes_are_observed(every_step):
    """Two requests; of the first its root and the node of its row 2, of the second
    its root alone, whose tree's other nodes say nothing."""
    seen = walk([[0, 2, 0], [0, 0, 0]], [2, 1])
    live = learnt(1, seen, tokens=[3, 8, 5, 9, 7], firsts=[0, 3, 5])
    assert torch.nonzero(live.totals).flatten().tolist() == [3, 5, 9]
    for token in (3, 5, 9):
        best = int(live.table.gains[token].argmax())
        assert int(live.table.ids[token, best]) == token + 1


def test_many_requests_have_their_turns(every_step):
    count = 60
    tokens = [index % WORDS for index in range(count)]
    seen = walk([[0] * 4] * count, [1] * count)
    # Eight requests a step: all have had a turn after eight steps.
    live = learnt(8, seen, tokens, firsts=list(range(count + 1)))
    assert (live.totals > 0).all()
    assert float(live.totals.sum()) < count + 8


def test_one_step_in_eight_is_learnt_from():
    from vllm_ppd.engine.v2.bigram_learner import EVERY

    seen = walk([[0, 0]], [1])
    assert not learnt(EVERY - 1, seen, [3], [0, 1]).totals.any()
    assert float(learnt(2 * EVERY, seen, [3], [0, 1]).totals.sum()) == 2


def test_drafts_get_better(plain, ppd, plain_engine, ppd_engine):
    """The same trees and prompt tokens, which are noise, without and with a table that
    starts empty."""
    what = {"prompts": prompts(6, seed=71), "params": {**GREEDY, "max_tokens": 40}}
    expected = plain.generate(plain_engine, **what)
    gained = []
    for online in (False, True):
        engine = engine_with(ppd_engine, online=online)
        before = ppd.accepted(engine)
        same(expected, ppd.call("v2.engine:generate_and_learn", engine, **what))
        gained.append(ppd.accepted(engine) - before)
    assert gained[1] > 1.1 * gained[0]
