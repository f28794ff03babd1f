"""Draft lengths that change while requests run, and every source of draft tokens."""

from __future__ import annotations

import shutil

import pytest

from tests.engine.conftest import PROMPTS, cpu_only
from tests.engine.test_exactness import GREEDY, mixed, same
from vllm_ppd.engine.v1.executor import count_other_rows
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, save_menus
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

pytestmark = cpu_only

ROOT = chain_tree(0, (3,))
BUSHY = SparseTree((0, 0, 1, 1, 3), (0, 1, 0, 1, 0), (3, 2, 1, 3, 0, 2))
# Deeper than prompt rows reach: an n-gram draft.
LONG = SparseTree((0, 1, 2, 3, 4, 0, 1), (0, 0, 0, 0, 0, 1, 1), (2, *[0] * 5, 3, 1))
USUAL = TreePolicy((ROOT, chain_tree(1, (3, 3)), chain_tree(2, (3, 3, 3)), BUSHY))
SMALL = TreePolicy((ROOT, *[chain_tree(1, (3, 1))] * 3))


def menu_file(folder, *entries: tuple[TreePolicy, ...]) -> str:
    menu = TreeMenu(tuple(MenuEntry(policies) for policies in entries))
    save_menus(folder / "trees.json", menu, menu)
    return str(folder / "trees.json")


def classes() -> tuple[TreePolicy, ...]:
    return USUAL, TreePolicy((LONG,) * 4), TreePolicy((LONG, LONG, LONG, BUSHY))


@pytest.fixture(scope="module")
def two_entries(tmp_path_factory) -> str:
    return menu_file(tmp_path_factory.mktemp("menu"), (SMALL,) * 3, classes())


def engine_with(ppd_engine, **settings):
    speculative = {**ppd_engine["speculative_config"], **settings}
    return {**ppd_engine, "speculative_config": speculative}


def drafts(ppd, engine) -> int:
    return ppd.call("spec_counters", engine)["num_drafts"]


def test_trees_switch_with_the_load(
    plain, ppd, plain_engine, ppd_engine, texts, two_entries
):
    """Lengths differ, so the load falls from 10 requests to 1 while they run."""
    engine = engine_with(ppd_engine, tree=two_entries)
    ppd.call("set_schedule", engine, lengths={2: 13, 5: 5, 1000: 0})
    prompts = mixed(texts, 10, first=20)
    params = [{**GREEDY, "max_tokens": 20 + 17 * i} for i in range(10)]
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))
    before = drafts(ppd, engine)
    assert before > 0
    # Six requests of one length never have drafts.
    params = [{**GREEDY, "max_tokens": 30}] * 6
    expected = plain.generate(plain_engine, prompts[:6], params)
    same(expected, ppd.generate(engine, prompts[:6], params))
    assert drafts(ppd, engine) == before
    params = [
        {"temperature": 1.0, "seed": i, "max_tokens": 20 + 9 * i} for i in range(10)
    ]
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))


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
    plain, ppd, plain_engine, ppd_engine, texts
):
    """The controller in force, whatever it measures on a busy machine."""
    ppd.call("fresh_controller", ppd_engine)
    prompts = mixed(texts, 4, first=60)
    params = {**GREEDY, "max_tokens": 300}
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(ppd_engine, prompts, params))
    observed = ppd.call("controller_snapshot", ppd_engine)
    assert sum(bucket["observed_steps"] for bucket in observed) > 50
    ppd.call("draft_as_much_as_possible", ppd_engine)


def test_requests_may_opt_out(plain, ppd, plain_engine, ppd_engine, texts, two_entries):
    engine = engine_with(ppd_engine, tree=two_entries)
    ppd.call("draft_as_much_as_possible", engine)
    prompts = [text[:200] for text in texts[40:42]]
    params = {**GREEDY, "max_tokens": 60}
    expected = plain.generate(plain_engine, prompts, params)
    before = drafts(ppd, engine)
    out = {**params, "extra_args": {"ppd": False}}
    same(expected, ppd.generate(engine, prompts, out))
    assert drafts(ppd, engine) == before
    same(expected, ppd.generate(engine, prompts, [params, out]))
    assert drafts(ppd, engine) > before + 2


@pytest.mark.parametrize(
    "settings",
    [{"ngram": False}, {"bigram": False}, {"ngram": False, "bigram": False}],
    ids=str,
)
def test_every_source_of_draft_tokens(
    plain, ppd, plain_engine, ppd_engine, texts, tmp_path, settings
):
    entry = (USUAL,) if settings.get("ngram") is False else classes()
    engine = engine_with(ppd_engine, tree=menu_file(tmp_path, entry), **settings)
    prompts = mixed(texts, 6, first=30)
    params = {**GREEDY, "max_tokens": 70}
    expected = plain.generate(plain_engine, prompts, params)
    same(expected, ppd.generate(engine, prompts, params))


def test_a_bigram_table_is_learnt_where_there_is_none(
    plain, ppd, plain_engine, ppd_engine, texts, tmp_path
):
    """The same trees, with nothing but prompt rows and with a table that starts empty:
    prompt rows do not see the root, so knowing what follows it helps."""
    folder = tmp_path / "prompts"
    shutil.copytree(PROMPTS, folder)
    (folder / "bigram.safetensors").unlink()
    policy = TreePolicy((ROOT, *[SparseTree((0, 0, 0), (0, 1, 2), (3, 2, 2, 2))] * 3))
    settings = {
        "model": str(folder),
        "tree": menu_file(tmp_path, (policy,)),
        "ngram": False,
    }
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
    metrics = ppd.call("metrics", ppd_engine, prefix="vllm:ppd_")
    assert metrics["vllm:ppd_emitted_tokens"] > metrics["vllm:ppd_request_steps"] > 0
    assert metrics["vllm:ppd_accepted_tokens"] > 0


def test_the_acceptance_rate_counts_draft_tokens():
    # Token ids of a vocabulary of 100, ids of prompt rows, and vLLM's own padding.
    scheduled = {"a": [1, 99, 100, 103], "b": [5], "c": [-1, -1]}
    assert count_other_rows(scheduled, 100) == {"a": 2, "b": 0, "c": 2}
