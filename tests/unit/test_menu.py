"""Tree menus: order, tree ids, limits, files."""

import pytest

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


def test_a_menu_of_plain_steps_alone_is_none():
    plain = TreePolicy((chain_tree(0, (0,)),) * 2)
    with pytest.raises(TreeError, match="at least 2 rows"):
        MenuEntry((plain,))
