"""Trees that change while requests run: by load, by evidence, by what traffic shows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.conftest import PROMPTS, cpu_only
from tests.engine.test_exactness import GREEDY, mixed, same
from vllm_ppd.engine.v1.executor import count_other_rows
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

pytestmark = cpu_only

ROOT = chain_tree(0, (3,))
BUSHY = SparseTree((0, 0, 1, 1, 3), (0, 1, 0, 1, 0), (3, 2, 1, 3, 0, 2))
# Deeper than prompt rows reach: the chain of an earlier match.
LONG = SparseTree((0, 1, 2, 3, 4, 0, 1), (0, 0, 0, 0, 0, 1, 1), (2, *[0] * 5, 3, 1))


def plan_file(folder, *tiers: Tier) -> str:
    path = folder / "plan.json"
    path.write_text(json.dumps(TreePlan(tiers).to_dict()))
    return str(path)


def policies() -> tuple[TreePolicy, ...]:
    usual = TreePolicy((ROOT, chain_tree(1, (3, 3)), chain_tree(2, (3, 3, 3)), BUSHY))
    return usual, TreePolicy((LONG,) * 4), TreePolicy((LONG, LONG, LONG, BUSHY))


@pytest.fixture(scope="module")
def tiers(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    usual, short, long = policies()
    less = TreePolicy((ROOT, *[chain_tree(1, (3, 1))] * 3))
    return plan_file(
        folder,
        Tier(2, (usual, short, long)),
        Tier(5, (less, less, less)),
        Tier(None),
    )


def engine_with(ppd_engine, **settings):
    speculative = {**ppd_engine["speculative_config"], **settings}
    return {**ppd_engine, "speculative_config": speculative}


def drafts(ppd, engine) -> int:
    return ppd.call("spec_counters", engine)["num_drafts"]


def test_trees_switch_with_the_load(plain, ppd, plain_engine, ppd_engine, texts, tiers):
    """Lengths differ, so the load falls from 10 requests to 1 while they run."""
    engine = engine_with(ppd_engine, tree=tiers)
    prompts = mixed(texts, 10, first=20)
    params = [{**GREEDY, "max_tokens": 20 + 17 * i} for i in range(10)]
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))
    before = drafts(ppd, engine)
    assert before > 0
    # Six requests of one length are never in a tier that speculates.
    params = [{**GREEDY, "max_tokens": 30}] * 6
    expected = plain.generate(plain_engine, prompts[:6], params)
    same(expected, ppd.generate(engine, prompts[:6], params))
    # Only their first steps may come padded, where prompts hit the prefix cache.
    assert drafts(ppd, engine) - before <= 6
    params = [
        {"temperature": 1.0, "seed": i, "max_tokens": 20 + 9 * i} for i in range(10)
    ]
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))


def test_trees_switch_with_the_context(
    plain, ppd, plain_engine, ppd_engine, texts, tmp_path
):
    """No guesses while contexts are short, few at first, then all."""
    usual, short, long = policies()
    less = TreePolicy((ROOT, *[chain_tree(1, (3, 1))] * 3))
    tree = plan_file(
        tmp_path,
        Tier(None, (), 80),
        Tier(2, (less,) * 3, 120),
        Tier(None, (), 120),
        Tier(3, (usual, short, long)),
        Tier(None, (less,) * 3),
    )
    engine = engine_with(ppd_engine, tree=tree)
    prompts = mixed(texts, 4, first=50)
    params = [{**GREEDY, "max_tokens": 140 + 20 * i} for i in range(4)]
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))
    before = drafts(ppd, engine)
    assert before > 0
    # A text that ends before contexts are long enough for any guess.
    prompt, params = [texts[50][:60]], {**GREEDY, "max_tokens": 30}
    expected = plain.generate(plain_engine, prompt, params)
    same(expected, ppd.generate(engine, prompt, params))
    assert drafts(ppd, engine) == before


@pytest.mark.parametrize("period", [2, 5])
def test_guesses_by_turns(plain, ppd, plain_engine, ppd_engine, texts, period):
    """As the load guard has it; steps without guesses are vLLM's own."""
    prompts = mixed(texts, 6, first=70)
    params = [{**GREEDY, "max_tokens": 40 + 9 * i} for i in range(6)]
    expected = plain.generate(plain_engine, prompts, params)
    found, steps = ppd.call(
        "generate_by_turns", ppd_engine, prompts=prompts, params=params, period=period
    )
    same(expected, found)
    assert (True, True) in steps and (True, False) not in steps
    assert steps.count((False, False)) > len(steps) // 5


def test_requests_may_opt_out(plain, ppd, plain_engine, ppd_engine, texts, tiers):
    engine = engine_with(ppd_engine, tree=tiers)
    prompts = [text[:200] for text in texts[40:42]]
    params = {**GREEDY, "max_tokens": 60}
    expected = plain.generate(plain_engine, prompts, params)
    before = drafts(ppd, engine)
    out = {**params, "extra_args": {"ppd": False}}
    same(expected, ppd.generate(engine, prompts, out))
    assert drafts(ppd, engine) - before <= 2
    before = drafts(ppd, engine)
    same(expected, ppd.generate(engine, prompts, [params, out]))
    assert drafts(ppd, engine) > before + 2


@pytest.mark.parametrize(
    "settings",
    [
        {"ngram": False},
        {"bigram": False},
        {"ngram": False, "bigram": False},
    ],
    ids=str,
)
def test_every_source_of_guesses(
    plain, ppd, plain_engine, ppd_engine, texts, tmp_path, settings
):
    usual, short, long = policies()
    classes = (usual,) if settings.get("ngram") is False else (usual, short, long)
    tree = plan_file(tmp_path, Tier(None, classes))
    engine = engine_with(ppd_engine, tree=tree, **settings)
    prompts = mixed(texts, 6, first=30)
    params = {**GREEDY, "max_tokens": 70}
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))


@pytest.fixture
def boastful(tmp_path) -> str:
    """Prompt tokens whose evidence has it that nearly every guess is right."""
    folder = tmp_path / "prompts"
    shutil.copytree(PROMPTS, folder)
    known = AcceptanceModel.load(folder / "evidence.json")
    best = np.zeros_like(known.prompted)
    best[:, 0] = 0.95
    sure = replace(
        known,
        prompted=best,
        unprompted=best[0],
        chain=np.full_like(known.chain, 0.99),
        overall=np.concatenate([best, best[:1]]),
    )
    sure.save(folder / "evidence.json")
    return str(folder)


def test_trees_follow_the_traffic(
    plain, ppd, plain_engine, ppd_engine, texts, boastful
):
    """Plans change while requests run, and nothing else does.

    DraftInputs are allowed by turns: by the clock of a busy machine there might be none,
    and so nothing to learn.
    """
    engine = engine_with(ppd_engine, model=boastful)
    prompts = mixed(texts, 8, first=60)
    first = ppd.call("report", engine)["plan"]
    for seed in range(4):
        params = [
            {"temperature": 1.3, "seed": 100 * seed + i, "max_tokens": 150}
            for i in range(8)
        ]
        expected = plain.generate(plain_engine, prompts, params)
        found, _ = ppd.call(
            "generate_by_turns", engine, prompts=prompts, params=params, period=64
        )
        same(expected, found)
        greedy = {**GREEDY, "max_tokens": 150}
        expected = plain.generate(plain_engine, prompts[:2], greedy)
        same(expected, ppd.generate(engine, prompts[:2], greedy))
        report = ppd.call("report", engine)
        if report["plan_changes"]:
            break
        ppd.call("await_search", engine)
    assert report["plan_changes"] > 0
    assert report["plan"] != first
    assert "tokens and" in report["line"]
    # Held to its first trees it learns no more, whatever comes.
    ppd.call("hold", engine, plan=first)
    same(expected, ppd.generate(engine, prompts[:2], greedy))
    report = ppd.call("report", engine)
    assert report["plan"] == first and report["plan_changes"] == 0


def test_successors_are_learnt_where_there_is_no_table(
    plain, ppd, plain_engine, ppd_engine, texts, tmp_path
):
    """The same trees, with nothing but prompt rows and with a table that starts empty:
    prompt rows do not see the root, so knowing what follows it helps."""
    folder = tmp_path / "prompts"
    shutil.copytree(PROMPTS, folder)
    (folder / "bigram.safetensors").unlink()
    policy = TreePolicy((ROOT, *[SparseTree((0, 0, 0), (0, 1, 2), (3, 2, 2, 2))] * 3))
    tree = plan_file(tmp_path, Tier(None, (policy,)))
    settings = {"model": str(folder), "tree": tree, "ngram": False}
    prompts = mixed(texts, 8, first=80)
    params = {**GREEDY, "max_tokens": 250}
    expected = plain.generate(plain_engine, prompts, params)
    gained = []
    for more in ({"bigram": False}, {}):
        engine = engine_with(ppd_engine, **settings, **more)
        before = ppd.accepted(engine)
        same(expected, ppd.generate(engine, prompts, params))
        gained.append(ppd.accepted(engine) - before)
    assert gained[1] > 1.1 * gained[0]


def test_metrics_of_our_own(ppd, ppd_engine, texts):
    ppd.generate(ppd_engine, [texts[3][:200]], {**GREEDY, "max_tokens": 100})
    found = ppd.call("metrics", ppd_engine, prefix="vllm:ppd_")
    assert found["vllm:ppd_emitted_tokens"] > found["vllm:ppd_request_steps"] > 0
    assert found["vllm:ppd_accepted_tokens"] > 0


def test_the_acceptance_rate_counts_candidates():
    # Token ids of a vocabulary of 100, ids of prompt rows, and vLLM's own padding.
    drafts = {"a": [1, 99, 100, 103], "b": [5], "c": [-1, -1]}
    assert count_other_rows(drafts, 100) == {"a": 2, "b": 0, "c": 2}


def test_prompts_are_found(ppd_engine):
    assert (PROMPTS / "bigram.safetensors").exists()
    assert (PROMPTS / "evidence.json").exists()
