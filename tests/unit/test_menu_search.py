"""Menus that are searched for: what they promise, and which one a folder gets."""

import itertools

import numpy as np
import pytest

from tests.unit.models import DEMO, published_model, random_model
from tests.unit.test_tree_search import all_trees
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve, LatencyProfile, expected_speedup
from vllm_ppd.search.menu_search import build_menu, menu_for, prior_lengths, step_ratios
from vllm_ppd.search.policy_iteration import best_policy, entry_figures, policy_value
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, load_menus, save_menus
from vllm_ppd.trees.tree import TreeError

CONSTANT = LatencyCurve.constant()
MODELS = {
    "demo": AcceptanceModel.load(DEMO / "acceptance.json"),
    "typical": AcceptanceModel.typical(3),
    "vicuna": published_model(),
}
PRICES = {f"{p:g}": LatencyCurve.linear(1, p) for p in (0, 0.001, 0.01, 0.05, 0.1, 0.2)}
# A step that drafts costs at least what two rows cost.
SHAPES = {
    "cpu": LatencyCurve((1, 2, 4, 8, 16), (1.15, 1.15, 1.3, 1.6, 2.4), 0.15),
    "gpu": LatencyCurve((1, 8, 16, 32, 64), (1.0, 1.02, 1.05, 1.12, 1.3), 0.02),
    "steep": LatencyCurve((1, 2, 4, 8, 16, 64), (1.5, 1.5, 1.6, 1.9, 2.6, 7), 0.11),
}


def menu_speed(menu: TreeMenu, model: AcceptanceModel, curve: LatencyCurve) -> float:
    """Tokens per second of the menu's fastest entry, or of plain decoding."""
    speeds = [
        policy_value([p.trees for p in entry.policies], model, curve)[1]
        for entry in menu.entries
    ]
    return max(*speeds, 1 / curve(1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_rows", [16, 64])
def test_a_menu_is_about_as_fast_as_the_best_policy_for_each_curve(name, max_rows):
    model = MODELS[name]
    menu = build_menu(model, max_rows)
    assert len(menu.entries) <= 12 and menu.max_rows == max_rows
    for shape, curve in {**PRICES, **SHAPES}.items():
        best = best_policy(model, curve, max_rows).tokens_per_second
        assert menu_speed(menu, model, curve) >= 0.985 * best, shape
        if shape in PRICES:
            assert menu_speed(menu, model, curve) >= 0.99 * best, shape


@pytest.mark.parametrize("name", MODELS)
def test_a_menu_of_fixed_rows_is_about_as_fast_as_any_number_of_rows(name):
    model = MODELS[name]
    menu = build_menu(model, 64, fixed_rows=True)
    assert [entry.row_shares for entry in menu.entries] == [
        ((entry.max_rows, 1.0),) for entry in menu.entries
    ]
    counts = (*range(2, 17), *range(18, 33, 2), *range(36, 65, 4))
    lengths = {n: best_policy(model, CONSTANT, n).acceptance_length for n in counts}
    for shape, curve in {**PRICES, **SHAPES}.items():
        best = max(length / curve(rows) for rows, length in lengths.items())
        speedups = (expected_speedup(entry, curve) for entry in menu.entries)
        assert max(speedups) >= 0.985 * best * curve(1), shape


@pytest.mark.parametrize("seed", range(3))
def test_no_trees_within_fixed_rows_accept_more(seed):
    table = np.sort(np.random.default_rng(seed).random((1, 2)) / 2)[:, ::-1]
    model = AcceptanceModel.of(table)
    most = dict.fromkeys(range(1, 6), 0.0)
    for pair in itertools.product(all_trees(5, 1, 2, 1), repeat=2):
        rows = max(tree.num_rows for tree in pair)
        most[rows] = max(most[rows], policy_value([pair], model, CONSTANT)[0])
    for entry in build_menu(model, 5, fixed_rows=True).entries:
        expected = max(most[rows] for rows in range(1, entry.max_rows + 1))
        assert entry.acceptance_length == pytest.approx(expected, abs=1e-6)


def test_entries_say_what_the_search_expects():
    model = random_model(5, m=2, ranks=3, classes=2)
    curve = LatencyCurve.linear(1, 0.03)
    for entry in build_menu(model, 12).entries:
        trees = [policy.trees for policy in entry.policies]
        length, speed, _ = policy_value(trees, model, curve)
        assert entry.acceptance_length == pytest.approx(length, abs=1e-6)
        seconds = sum(share * curve(rows) for rows, share in entry.row_shares)
        assert length / seconds == pytest.approx(speed)
        figures = entry_figures(entry, model)
        assert sum(each.share for each in figures) == pytest.approx(1)
        mean = sum(each.share * each.acceptance_length for each in figures)
        assert mean == pytest.approx(length)


@pytest.mark.parametrize("num_ept", [1, 2])
@pytest.mark.parametrize("fixed_rows", [True, False])
def test_extreme_models_have_a_menu_too(num_ept, fixed_rows):
    hopeless = AcceptanceModel.of(np.zeros((2, 3)))
    menu = build_menu(hopeless, 16, num_ept, fixed_rows)
    assert menu.draft_lengths == (num_ept,)
    assert menu.entries[0].acceptance_length == pytest.approx(1)
    certain = AcceptanceModel.of(np.eye(3)[[0, 0]])
    menu = build_menu(certain, 16, num_ept, fixed_rows)
    assert menu.entries[-1].acceptance_length == pytest.approx(3, rel=1e-3)
    # Rows without use are not scheduled: two draft tokens, two prompt tokens on each.
    assert menu.max_rows <= 3 + 6 * num_ept


# Which menu a folder gets ----------------------------------------------------------


def folder_menu(folder, **changes) -> TreeMenu:
    settings = {
        "num_prompt_tokens": 3,
        "num_ept": 1,
        "bigram": True,
        "ngram": True,
        "max_rows": 16,
        "fixed_rows": False,
        **changes,
    }
    return menu_for(folder, **settings)


def test_the_folders_own_menu_is_what_its_model_gives():
    variable, fixed = load_menus(DEMO / "trees.json")
    assert folder_menu(DEMO) == variable == build_menu(MODELS["demo"], 16)
    on_gpu = folder_menu(DEMO, max_rows=64, fixed_rows=True)
    assert on_gpu == fixed == build_menu(MODELS["demo"], 64, fixed_rows=True)
    # Other sources of draft tokens need other trees.
    without = folder_menu(DEMO, ngram=False)
    assert without == build_menu(MODELS["demo"].without_ngram(), 16)
    assert folder_menu(DEMO, bigram=False) == (
        build_menu(MODELS["demo"].without_bigram(), 16)
    )
    # Fewer rows cut the menu; far fewer leave too little of it.
    assert folder_menu(DEMO, max_rows=12) == variable.limited(12)
    assert variable.limited(5).max_rows == 2
    assert folder_menu(DEMO, max_rows=5) == build_menu(MODELS["demo"], 5)


def test_a_folder_without_files_gets_a_typical_menu(tmp_path):
    typical = AcceptanceModel.typical(3)
    assert folder_menu(tmp_path) == build_menu(typical.without_bigram(), 16)
    assert folder_menu(tmp_path, ngram=False).num_classes == 1
    typical = AcceptanceModel.typical(2)
    menu = folder_menu(tmp_path, num_prompt_tokens=2, num_ept=3)
    assert (menu.num_prompt_tokens, menu.num_ept) == (2, 3)
    assert build_menu(typical.without_bigram(), 16, 3) == menu


@pytest.mark.parametrize("fixed_rows", [True, False])
def test_a_menu_without_prompt_tokens(fixed_rows):
    for sources in ({}, {"bigram": False}, {"ngram": False}):
        how = {"num_prompt_tokens": 0, "fixed_rows": fixed_rows, **sources}
        menu = folder_menu(None, **how)
        assert menu.num_prompt_tokens == 0
        assert menu.num_classes == (1 if "ngram" in sources else 3)
        assert TreeMenu.from_dict(menu.to_dict()) == menu
        lengths = [entry.acceptance_length for entry in menu.entries]
        assert lengths == sorted(lengths) and lengths[0] > 1.05
        assert {sum(tree.prompts) for tree in menu.trees} == {0}
        # N-gram drafts alone have nothing to try where nothing matches.
        first = menu.entries[-1].policies[0].trees[0]
        assert (first.num_rows > 1) == ("bigram" not in sources)


def test_the_users_own_menu(tmp_path):
    path = tmp_path / "mine.json"
    menu = TreeMenu(build_menu(published_model(), 8).entries[1:])
    save_menus(path, menu, menu)
    assert folder_menu(DEMO, tree_file=str(path)) == menu
    least = menu.draft_lengths[0]
    assert folder_menu(DEMO, tree_file=str(path), max_rows=least + 1).max_rows == (
        least + 1
    )
    message = rf"num_speculative_tokens is {least - 1}, too small .*at least {least}"
    with pytest.raises(TreeError, match=message):
        folder_menu(DEMO, tree_file=str(path), max_rows=least)


def test_menus_for_other_prompt_tokens_are_refused():
    for changes in ({"num_prompt_tokens": 2}, {"num_ept": 2}):
        for tree_file in (None, str(DEMO / "trees.json")):
            with pytest.raises(TreeError, match="for 3 prompt tokens of 1 EPT"):
                folder_menu(DEMO, tree_file=tree_file, **changes)


def test_the_profile_decides_how_each_load_starts():
    menu = build_menu(MODELS["demo"], 16)
    rows = (1, 2, 4, 8, 16)
    # Rows are cheap for one request and as dear as whole steps for many.
    table = ((1.0, 1.02, 1.04, 1.08, 1.16), tuple(map(float, rows)))
    profile = LatencyProfile((1, 16), rows, table, {})
    lengths = prior_lengths(menu, profile, [1, 2, 4, 8, 16])
    assert lengths[0] == 15 and lengths[-1] == 0
    assert lengths == sorted(lengths, reverse=True)
    curve = profile.curve(4)
    speedups = {e.num_draft_tokens: expected_speedup(e, curve) for e in menu.entries}
    assert lengths[2] == max(speedups, key=lambda length: speedups[length])
    ratios = step_ratios(menu, profile, [4])[0]
    assert speedups == {
        e.num_draft_tokens: pytest.approx(e.acceptance_length / ratio)
        for e, ratio in zip(menu.entries, ratios, strict=True)
    }
    # A menu that does not say what it accepts starts with plain decoding.
    silent = TreeMenu(tuple(MenuEntry(entry.policies) for entry in menu.entries))
    assert prior_lengths(silent, profile, [1, 16]) == [0, 0]
