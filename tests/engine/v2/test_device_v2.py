"""What makes V2 fast stays true: the host never waits for PPD, and load picks trees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engine.v2.test_exactness_v2 import GREEDY, prompts, same
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import TreePolicy, chain_tree


@pytest.fixture(scope="module")
def tiers(tiny_trees: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bushy trees for one request, a short chain for two, nothing from four on."""
    policy = TreePolicy.load(tiny_trees)
    short = TreePolicy(
        tuple(chain_tree(min(s, 1), (1,) * (min(s, 1) + 1), 2) for s in range(4))
    )
    plan = TreePlan((Tier(1, (policy,)), Tier(3, (short,)), Tier(None)))
    path = tmp_path_factory.mktemp("tiers") / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    return str(path)


def with_tree(engine: dict[str, Any], tree: str) -> dict[str, Any]:
    return {
        **engine,
        "speculative_config": {**engine["speculative_config"], "tree": tree},
    }


def test_the_host_reads_nothing_from_the_device(ppd, tiny_ppd):
    requests = prompts(3, seed=41)
    params = [
        {**GREEDY, "max_tokens": 5},
        {**GREEDY, "max_tokens": 5, "temperature": 1.0, "seed": 1, "logprobs": 2},
        {**GREEDY, "max_tokens": 5, "presence_penalty": 0.5},
    ]
    found = ppd.call("host_reads", tiny_ppd, prompts=requests, params=params)
    # vLLM's upper bound of sequence lengths, which lives on the host.
    assert found == ["sampling.py:_sample:numpy"]


def test_nor_does_it_where_nobody_guesses(ppd, tiny_ppd, tiers):
    engine = with_tree(tiny_ppd, tiers)
    requests = prompts(5, seed=42)
    params = {**GREEDY, "max_tokens": 5}
    found = ppd.call("host_reads", engine, prompts=requests, params=params)
    assert found == []


def test_trees_follow_the_load(plain, ppd, tiny_engine, tiny_ppd, tiers):
    """Requests end one by one: no trees, then short ones, then bushy ones."""
    engine = with_tree(tiny_ppd, tiers)
    requests = prompts(5, seed=43)
    params = [{**GREEDY, "max_tokens": 4 + 5 * i} for i in range(5)]
    same(
        plain.generate(tiny_engine, requests, params),
        ppd.generate(engine, requests, params),
    )
    rows = ppd.call("rows_per_step", engine, prompts=requests, params=params)
    # Bushy trees have 31 rows at most, short chains 6.
    assert {(5, 1), (2, 6), (1, 31)} <= set(rows)
    # A tier is chosen a step ahead, for as many requests as then run.
    assert {count for count, most in rows if most == 31} == {1}
    assert {most for count, most in rows if count >= 4} == {1}
