"""Tree menus: order, tree ids, limits, files."""

import json

import pytest

from tests.unit.refusals import refused
from vllm_ppd.files import FormatError, write_json
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, load_menus, save_menus
from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy, chain_tree

SMALL = TreePolicy((chain_tree(0, (1,)), chain_tree(1, (1, 1))))
FORK = TreePolicy((chain_tree(0, (1,)), SparseTree((0, 0, 1), (0, 1, 0), (1, 1, 0, 0))))
FIRST = MenuEntry((SMALL, SMALL), 1.4, ((2, 0.25), (4, 0.75)))
MENU = TreeMenu((FIRST, MenuEntry((SMALL, FORK))))


def test_entries_and_tree_ids():
    # One root-only tree, then entry by entry, class by class, by num_prompted.
    assert MENU.trees == (chain_tree(0, (0,)), *SMALL.trees * 3, *FORK.trees)
    assert MENU.first_trees == (1, 5)
    classes = (False, False, True, True)
    assert MENU.chained == (False, *classes, *classes)
    assert MENU.draft_lengths == (3, 5)
    sizes = MENU.num_classes, MENU.num_prompt_tokens, MENU.num_ept
    assert sizes == (2, 1, 1)
    assert MENU.max_rows == 6


def test_the_entry_of_a_draft_length():
    lengths = range(8)
    assert [MENU.entry_of(n) for n in lengths] == [None] * 3 + [0, 0, 1, 1, 1]
    assert [MENU.first_tree(n) for n in lengths] == [0, 0, 0, 1, 1, 5, 5, 5]


def test_limits():
    assert MENU.limited(6) == MENU
    assert MENU.limited(5) == MENU.limited(4) == TreeMenu((FIRST,))
    assert MENU.limited(3) is None


def test_files(tmp_path):
    path = tmp_path / "trees.json"
    fixed = TreeMenu((MenuEntry((FORK,)),))
    save_menus(path, MENU, fixed)
    assert load_menus(path) == (MENU, fixed)
    assert [file.name for file in tmp_path.iterdir()] == ["trees.json"]
    assert TreeMenu.from_dict(MENU.to_dict()) == MENU


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.clear(), "needs at least one entry"),
        (lambda e: e.reverse(), "must rise, not [5, 3]"),
        (lambda e: e.append(e[-1]), "must rise, not [3, 5, 5]"),
        (lambda e: e.append(3), "entry cannot be used: it must be an object, not int"),
        (lambda e: e[0].pop("policies"), "'policies' is missing"),
        (lambda e: e[0].update(polices=[]), "did you mean 'policies'"),
        (lambda e: e[0].update(policies=[]), "at least one policy"),
        (lambda e: e[0]["policies"].pop(), "same number of match classes"),
        (lambda e: e[0]["policies"][0].update(num_ept=2), "same prompt tokens"),
        (lambda e: e[0]["policies"][0].update(format_version=9), "format_version is 9"),
        (lambda e: e[0].update(acceptance_length=0.5), "acceptance_length is 0.5"),
        (lambda e: e[0].update(acceptance_length="1"), "cannot be used"),
        (lambda e: e[0].update(row_shares=[[2, 0.5]]), "shares that sum to 1"),
        (lambda e: e[0].update(row_shares=[2]), "cannot be used"),
        (
            lambda e: e[0]["policies"][0]["trees"][1].update(ranks=[0, 0]),
            "tree 1: a tree of 1 draft tokens needs 1 ranks",
        ),
    ],
)
def test_bad_menus(tmp_path, change, message):
    path = tmp_path / "trees.json"
    save_menus(path, MENU, MENU)
    content = json.loads(path.read_text())
    entries = content["fixed_rows"]
    change(entries)
    write_json(path, content)
    with refused(TreeError, path, "vllm-ppd calibrate", message):
        load_menus(path)
    with refused((TreeError, FormatError), message):
        TreeMenu.from_dict({"entries": entries})


def test_a_menu_of_plain_steps_alone_is_none():
    plain = TreePolicy((chain_tree(0, (0,)),) * 2)
    with pytest.raises(TreeError, match="at least 2 rows"):
        MenuEntry((plain,))
