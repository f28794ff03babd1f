"""Draft lengths that change while requests run, and every source of draft tokens."""

from __future__ import annotations

import shutil

import pytest

from tests.engine.conftest import (
    GREEDY,
    PROMPTS,
    cpu_only,
    engine_with,
    menu_file,
    mixed,
    same,
)
from vllm_ppd.engine.v1.executor import count_other_rows
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

pytestmark = cpu_only

ROOT = chain_tree(0, (3,))
BUSHY = SparseTree((0, 0, 1, 1, 3), (0, 1, 0, 1, 0), (3, 2, 1, 3, 0, 2))
# Deeper than prompt rows reach: an n-gram draft.
LONG = SparseTree((0, 1, 2, 3, 4, 0, 1), (0, 0, 0, 0, 0, 1, 1), (2, *[0] * 5, 3, 1))
USUAL = TreePolicy((ROOT, chain_tree(1, (3, 3)), chain_tree(2, (3, 3, 3)), BUSHY))
SMALL = TreePolicy((ROOT, *[chain_tree(1, (3, 1))] * 3))


def classes() -> tuple[TreePolicy, ...]:
    return USUAL, TreePolicy((LONG,) * 4), TreePolicy((LONG, LONG, LONG, BUSHY))


@pytest.fixture(scope="module")
def two_entries(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("menu") / "trees.json"
    return menu_file(path, (SMALL,) * 3, classes())


def drafts(ppd, engine) -> int:
    return ppd.call("spec_counters", engine)["num_drafts"]


def test_trees_switch_with_the_load(check, ppd, ppd_engine, texts, two_entries):
    """Lengths differ, so the load falls from 10 requests to 1 while they run."""
    tree = {"tree": two_entries}
    engine = engine_with(ppd_engine, **tree)
    # 13 draft rows for 1 and 2 requests, 5 for up to 5, none for more.
    ppd.call("draft_within", engine, max_step_rows=30)
    prompts = mixed(texts, 10, first=20)
    check(prompts, [{**GREEDY, "max_tokens": 20 + 17 * i} for i in range(10)], tree)
    before = drafts(ppd, engine)
    assert before > 0
    # Six requests of one length never have drafts.
    check(prompts[:6], [{**GREEDY, "max_tokens": 30}] * 6, tree)
    assert drafts(ppd, engine) == before
    sampled = {"temperature": 1.0}
    params = [{**sampled, "seed": i, "max_tokens": 20 + 9 * i} for i in range(10)]
    check(prompts, params, tree)


@pytest.mark.parametrize("period", [2, 5])
def test_draft_lengths_by_turns(plain, ppd, plain_engine, ppd_engine, texts, period):
    """As the controller's probes have it; plain steps run vLLM's own code."""
    prompts = mixed(texts, 6, first=70)
    params = [{**GREEDY, "max_tokens": 40 + 9 * i} for i in range(6)]
    expected = plain.generate(plain_engine, prompts, params)
    actual, steps = ppd.call(
        "generate_by_turns", ppd_engine, prompts=prompts, params=params, period=period
    )
    same(expected, actual)
    assert (True, True) in steps and (True, False) not in steps
    assert steps.count((False, False)) > len(steps) // 5


def test_an_engine_without_a_profile_starts_plainly_and_adapts(
    check, ppd, ppd_engine, texts
):
    """The controller in force, whatever it measures on a busy machine."""
    ppd.call("fresh_controller", ppd_engine)
    check(mixed(texts, 4, first=60), {**GREEDY, "max_tokens": 300})
    observed = ppd.call("controller_snapshot", ppd_engine)
    assert sum(bucket["observed_steps"] for bucket in observed) > 50
    ppd.call("draft_as_much_as_possible", ppd_engine)


def test_requests_may_opt_out(check, ppd, ppd_engine, texts, two_entries):
    tree = {"tree": two_entries}
    engine = engine_with(ppd_engine, **tree)
    ppd.call("draft_as_much_as_possible", engine)
    prompts = [text[:200] for text in texts[40:42]]
    params = {**GREEDY, "max_tokens": 60}
    out = {**params, "extra_args": {"ppd": False}}
    before = drafts(ppd, engine)
    check(prompts, out, tree)
    assert drafts(ppd, engine) == before
    check(prompts, [params, out], tree)
    assert drafts(ppd, engine) > before + 2


@pytest.mark.parametrize(
    "settings",
    [{"ngram": False}, {"bigram": False}, {"ngram": False, "bigram": False}],
    ids=str,
)
def test_every_source_of_draft_tokens(check, texts, tmp_path, settings):
    entry = (USUAL,) if settings.get("ngram") is False else classes()
    settings = {**settings, "tree": menu_file(tmp_path / "trees.json", entry)}
    check(mixed(texts, 6, first=30), {**GREEDY, "max_tokens": 70}, settings)


def test_a_bigram_table_is_learnt_where_there_is_none(check, texts, tmp_path):
    """The same trees, with nothing but prompt rows and with a table that starts empty:
    prompt rows do not see the root, so knowing what follows it helps."""
    folder = tmp_path / "prompts"
    shutil.copytree(PROMPTS, folder)
    (folder / "bigram.safetensors").unlink()
    policy = TreePolicy((ROOT, *[SparseTree((0, 0, 0), (0, 1, 2), (3, 2, 2, 2))] * 3))
    settings = {
        "model": str(folder),
        "tree": menu_file(tmp_path / "trees.json", (policy,)),
        "ngram": False,
    }
    prompts, params = mixed(texts, 8, first=80), {**GREEDY, "max_tokens": 250}
    _, _, without = check(prompts, params, {**settings, "bigram": False})
    assert check(prompts, params, settings)[2] > 1.1 * without


def test_the_acceptance_rate_counts_draft_tokens():
    # Token ids of a vocabulary of 100, ids of prompt rows, and vLLM's own padding.
    scheduled = {"a": [1, 99, 100, 103], "b": [5], "c": [-1, -1]}
    assert count_other_rows(scheduled, 100) == {"a": 2, "b": 0, "c": 2}
