"""vllm-ppd tree: the table of the menu, drawings and errors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vllm_ppd.cli import main
from vllm_ppd.cli.tree import text_tree
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
from vllm_ppd.search.latency import LatencyProfile, expected_speedup
from vllm_ppd.search.menu_search import build_menu
from vllm_ppd.search.policy_iteration import TreeFigures
from vllm_ppd.trees.menu import MENU_FILE, save_menus
from vllm_ppd.trees.tree import SparseTree

MODEL = AcceptanceModel.typical(2)
MENU, FIXED = build_menu(MODEL, 16), build_menu(MODEL, 32, fixed_rows=True)
PROFILE = LatencyProfile(
    (1, 16), (1, 4, 16), ((0.01, 0.0101, 0.0102), (0.02, 0.2, 0.8)), {"device": "Slow"}
)
# Below the root: its best token with two children, then four like leaves and one more.
BUSHY = SparseTree(
    (0, 1, 1, 0, 0, 0, 0, 0), (0, 0, 1, 1, 2, 3, 5, 4), (2, 1, 1, 0, 0, 0, 0, 0, 1)
)
REACHED = np.array([1.0, 0.4, 0.1, 0.05, 0.2, 0.1, 0.05, 0.03, 0.04])


@pytest.fixture
def folder(prompts_folder: Path) -> Path:
    """Prompt tokens with a measured acceptance model."""
    MODEL.save(prompts_folder / ACCEPTANCE_FILE)
    return prompts_folder


@pytest.fixture
def tree(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run the command on the folder; returns what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv: str, status: int = 0) -> str:
        done = main.main(["tree", str(folder), "--device", "cpu", *argv])
        shown = capsys.readouterr()
        assert done == status, shown.err
        return shown.err if status else shown.out

    return run


def lines(figures: TreeFigures, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=60)
    console.print(text_tree(figures))
    file.seek(0)
    return [line.rstrip() for line in file.read().splitlines()]


def rows_of(text: str) -> dict[str, list[str]]:
    """The lines of the menu's table by draft length."""
    rows = [line.split() for line in text.splitlines()]
    return {
        row[0]: row[1:] for row in rows if "." in "".join(row[1:3]) and row[0].isdigit()
    }


def test_a_tree_as_text() -> None:
    assert lines(TreeFigures(0, BUSHY, 0.5, REACHED)) == [
        "root +2",
        "├── #1 40% +1",
        "│   ├── #1 10% +1",
        "│   └── #2 5%",
        "├── #2 to #4 20% to 5%",
        "├── #5 4% +1",
        "└── #6 3%",
    ]


def test_below_an_ngram_draft_ranks_count_the_others() -> None:
    assert lines(TreeFigures(1, BUSHY, 0.5, REACHED), "ascii") == [
        "root +2",
        "+-- n-gram 40% +1",
        "|   +-- n-gram 10% +1",
        "|   `-- #1 5%",
        "+-- #1 to #3 20% to 5%",
        "+-- #4 4% +1",
        "`-- #5 3%",
    ]
    # Off the n-gram draft, ranks count from the best token again.
    off = SparseTree((0, 1), (1, 0), (0, 0, 0))
    figures = TreeFigures(1, off, 0.5, np.array([1, 0.5, 0.2]))
    assert lines(figures) == ["root", "└── #1 50%", "    └── #1 20%"]


def test_the_menu(tree, folder: Path) -> None:
    save_menus(folder / MENU_FILE, MENU, FIXED)
    shown = tree()
    assert max(map(len, shown.splitlines())) <= 80
    for text in (
        "2 prompt tokens, bigram table (learnt while serving), n-gram matches",
        "measured (acceptance.json)",
        "CPU; add --profile FILE",
        "steps without an n-gram match:",
        "steps with an n-gram match:",
    ):
        assert text in " ".join(shown.split())
    table = rows_of(shown)
    assert list(table) == ["0", *map(str, MENU.draft_lengths)]
    for entry in MENU.entries:
        mean_rows = sum(rows * share for rows, share in entry.row_shares)
        cells = table[str(entry.num_draft_tokens)]
        assert cells == [f"{mean_rows:.1f}", f"{entry.acceptance_length:.2f}"]
    wide = rows_of(tree("--device", "cuda"))
    assert list(wide) == ["0", *map(str, FIXED.draft_lengths)]
    limited = rows_of(tree("--max-draft-tokens", "4"))
    assert max(map(int, limited)) <= 4


def test_speeds_of_a_measured_machine(tree, tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "p.json")
    shown = tree("--profile", str(tmp_path / "p.json"))
    assert "Slow" in shown
    table = rows_of(shown)
    best = {load: 0.0 for load in (1, 4, 16, 64)}
    for entry in MENU.entries:
        cells = table[str(entry.num_draft_tokens)][2:]
        for load, cell in zip(best, cells, strict=True):
            speed = expected_speedup(entry, PROFILE.curve(load))
            assert cell == f"{speed:.2f}x"
            best[load] = max(best[load], speed)
    assert best[1] > 1 > best[64]
    # The tree that is drawn is of the fastest entry at one request.
    fastest = max(MENU.entries, key=lambda e: expected_speedup(e, PROFILE.curve(1)))
    assert f"Draft length {fastest.num_draft_tokens}, " in shown


def test_sources_can_be_left_out(tree, folder: Path) -> None:
    shown = tree("--no-ngram", "--no-bigram")
    assert "from 2 prompt tokens acceptance measured" in " ".join(shown.split())
    assert "n-gram" not in shown
    (folder / ACCEPTANCE_FILE).unlink()
    assert "typical values; vllm-ppd calibrate" in tree()


def test_without_prompt_tokens(capsys) -> None:
    assert main.main(["tree", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens from bigram table (learnt while serving), n-gram matches" in shown
    assert "+" not in shown.partition("Draft length")[2].partition("#1 is the")[0]


def test_a_menu_of_the_users_own(tree, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    save_menus(file, build_menu(MODEL.without_ngram(), 6), FIXED)
    shown = tree("--tree", str(file))
    assert str(file) in "".join(shown.split())
    assert max(map(int, rows_of(shown))) == 5
    assert "n-gram match" not in shown
    drawn = str(MENU.draft_lengths[-1])
    assert f"Draft length {drawn}, " in tree("--draw", drawn)
