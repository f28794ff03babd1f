"""vllm-ppd tree: drawings, figures by load, files and errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from vllm_ppd.adaptive.context_cost import ContextCost
from vllm_ppd.cli import main
from vllm_ppd.cli.tree_view import bar, match_name, percent, trees_view
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
from vllm_ppd.search.plan_search import best_plan
from vllm_ppd.search.latency import LatencyProfile, default_profile
from vllm_ppd.search.report import evidence_for, load_figures, load_labels
from vllm_ppd.search.tree_plot import node_places
from vllm_ppd.trees.bigram import BIGRAM_FILE
from vllm_ppd.trees.drawing import ASCII, LINES, tree_lines
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy, chain_tree

RANKS = 0.5 * np.arange(1, 7.0) ** -1.3
EVIDENCE = AcceptanceModel(
    np.stack([0.5 * RANKS, 0.4 * RANKS]),
    0.3 * RANKS,
    np.array([[0.5] * 4, [0.8] * 4]),
    np.stack([np.stack([0.4 * RANKS, 0.3 * RANKS])] * 2),
    np.array(
        [
            [[0.6, 0.25, 0.15], [0.5, 0.25, 0.25], [0.35, 0.15, 0.5]],
            [[0.6, 0.25, 0.15], [0.3, 0.25, 0.45], [0.15, 0.15, 0.7]],
        ]
    ),
    np.stack([0.6 * RANKS, 0.5 * RANKS, 0.3 * RANKS]),
)
# Below the root: its best guess with two children, then four like leaves and one more.
BUSHY = SparseTree(
    (0, 1, 1, 0, 0, 0, 0, 0), (0, 0, 1, 1, 2, 3, 5, 4), (2, 1, 1, 0, 0, 0, 0, 0, 1)
)
REACHED = (1.0, 0.4, 0.1, 0.05, 0.2, 0.1, 0.05, 0.04, 0.03)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prompt tokens with measured acceptance and, in name, a bigram table."""
    base = BaseModelFingerprint("org/base", None, "LlamaForCausalLM", 4, 30, None)
    path = tmp_path / "prompts"
    PromptTokens(torch.zeros(2, 1, 4), base).save(path)
    EVIDENCE.save(path / ACCEPTANCE_FILE)
    (path / BIGRAM_FILE).touch()
    return path


@pytest.fixture
def tree(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run the command on the folder; returns what it printed."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*argv: str, status: int = 0) -> str:
        done = main.main(["tree", str(folder), "--device", "cpu", *argv])
        shown = capsys.readouterr()
        assert done == status, shown.err
        return shown.err if status else shown.out

    return run


def drawn(*args, **kwargs) -> tuple[list[str], int]:
    lines, hidden = tree_lines(*args, **kwargs)
    return [line.guide + line.label for line in lines], hidden


def test_a_tree_as_text() -> None:
    text = ["root", "├ 1", "│ ├ 1", "│ └ 2", "├ 4 of 2-6", "└ 5"]
    assert drawn(BUSHY, REACHED) == (text, 0)
    lines, _ = tree_lines(BUSHY, REACHED)
    assert [line.depth for line in lines] == [0, 1, 2, 2, 1, 1]
    assert [line.prompts for line in lines] == [2, 1, 1, 0, 0, 1]
    assert lines[4].reached == (0.2, 0.1, 0.05, 0.04)
    two = SparseTree((0, 0), (0, 1), (0, 0, 0))
    assert drawn(two, (1, 0.5, 0.2), guides=ASCII)[0] == ["root", "|-1", "`-2"]


def test_on_a_chain_the_first_child_is_the_copied_token() -> None:
    text = ["root", "├ copy", "│ ├ copy", "│ └ 1", "├ 4 of 1-5", "└ 4"]
    assert drawn(BUSHY, REACHED, chained=True) == (text, 0)
    # Off the chain ranks count from the best guess again.
    off = SparseTree((0, 1), (1, 0), (0, 0, 0))
    assert drawn(off, (1, 0.5, 0.2), chained=True)[0] == ["root", "└ 1", "  └ 1"]


@pytest.mark.parametrize("limit", range(1, 8))
def test_a_limit_keeps_the_likeliest_with_their_parents(limit: int) -> None:
    lines, hidden = tree_lines(BUSHY, REACHED, limit=limit)
    nodes = {node for line in lines for node in line.nodes}
    assert len(lines) == min(limit, 6)
    assert hidden == BUSHY.num_nodes - len(nodes)
    assert all(node == 0 or BUSHY.parents[node - 1] in nodes for node in nodes)
    left = set(range(BUSHY.num_nodes)) - nodes
    firsts = [line.reached[0] for line in lines]
    assert not left or max(REACHED[node] for node in left) <= min(firsts)


def test_places_in_the_picture() -> None:
    places = node_places(BUSHY.parents)
    assert [depth for _, depth in places] == list(BUSHY.node_depths)
    # Leaves from left to right: nodes 2 and 3 under 1, then 4 to 8 under the root.
    assert [places[n][0] for n in (2, 3, 4, 5, 6, 7, 8)] == [0, 1, 2, 3, 4, 5, 6]
    assert places[1][0] == 0.5
    assert places[0][0] == (0.5 + 6) / 2


def test_words_and_bars() -> None:
    assert [percent(p) for p in (1, 0.333, 0.0996, 0.0994, 0.0004, 0)] == [
        *("100%", "33%", "10%", "9.9%", "<.1%", "0.0%")
    ]
    assert bar(0.5, 4, utf8=True) == "██"
    assert bar(0.3, 4, utf8=True) == "█▎"
    assert bar(2.0, 4, utf8=False) == "####"
    assert load_labels([1, 2, 4]) == ["1", "2", "3 on"]
    assert load_labels([1, 4, 16]) == ["1", "2-4", "5 on"]
    assert load_labels([8]) == ["1 on"]
    assert match_name(2, 3) == "earlier match of 4 or more tokens"
    assert match_name(0, 1) == ""


def test_figures_are_those_of_the_search() -> None:
    profile = default_profile("cpu")
    plan, planned = best_plan(EVIDENCE, profile, 12)
    assert planned[0].speculates and not planned[-1].speculates
    acceptance = evidence_for(plan, EVIDENCE)
    for each in planned:
        found = load_figures(plan, acceptance, profile, each.requests)
        if not each.speculates:
            assert (found.tau, found.gain, found.states) == (1, 1, ())
            continue
        assert found.tau == pytest.approx(each.found.tau, rel=1e-6)
        # The search stops when what requests pay for each other has nearly settled.
        close = 1e-6 if each.requests == 1 else 0.03
        assert found.gain == pytest.approx(each.gain, rel=close)
        assert found.mean_rows == pytest.approx(each.found.mean_rows, rel=1e-6)
        assert sum(state.share for state in found.states) == pytest.approx(1)
        mean = sum(state.share * state.tokens for state in found.states)
        assert mean == pytest.approx(found.tau, rel=1e-6)


def test_a_plan_of_one_class_sees_no_matches() -> None:
    policy = TreePolicy((chain_tree(0, (1,)), chain_tree(1, (1, 1))))
    plan = TreePlan.of(policy)
    one = AcceptanceModel(
        EVIDENCE.prompted[:1],
        EVIDENCE.unprompted,
        EVIDENCE.chain,
        EVIDENCE.beside[:, :1],
        EVIDENCE.moves,
        EVIDENCE.overall[[0, -1]],
    )
    found = load_figures(
        plan, evidence_for(plan, one), LatencyProfile((1,), (1,), ((2.0,),), {}), 4
    )
    # Every step but the first has a guess, right by the overall chance.
    assert found.tau == pytest.approx(1 + EVIDENCE.overall[0, 0], rel=1e-3)
    # Unmeasured loads and rows cost in proportion.
    assert found.plain_seconds == 8.0
    assert found.plain_tokens_per_second == 0.5
    assert found.tokens_per_second == pytest.approx(found.gain * 0.5)
    two = TreePlan((Tier(None, (policy, policy)),))
    with pytest.raises(TreeError, match="2 match classes; serving knows 3, or 1"):
        evidence_for(two, one)


def test_the_terminal(tree) -> None:
    shown = tree("--rows", "12")
    assert max(map(len, shown.splitlines())) <= 100
    for text in (
        "2 prompt tokens, bigram table, earlier matches (acceptance.json)",
        "a typical CPU",
        "at most 12 rows",
        "plain decoding",
        "earlier match of 2 to 3 tokens",
        "earlier match of 4 or more tokens",
        "copy",
        "trees: up to",
    ):
        assert text in shown


def test_sources_can_be_left_out(tree, folder: Path) -> None:
    shown = tree("--no-ngram", "--no-bigram")
    assert "2 prompt tokens (acceptance.json)" in shown
    assert "copy" not in shown and "earlier match" not in shown
    (folder / ACCEPTANCE_FILE).unlink()
    assert "typical chances: calibrate" in tree()


def test_loads_that_are_asked_for(tree, tmp_path: Path) -> None:
    policies = best_plan(EVIDENCE, default_profile("cpu"), 12)[0].tiers[0].policies
    plan = TreePlan((Tier(1, policies), Tier(4, policies[:1] * 3), Tier(None)))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_dict()))
    shown = tree("--tree", str(file), "--requests", "3,500")
    rows = [line.split() for line in shown.splitlines()]
    assert {"3", "500"} <= {row[0] for row in rows if row}
    assert "trees: up to 4 running requests" in shown
    # At 500 requests there are no trees to draw.
    assert shown.count("trees: ") == 1
    alone = tree("--tree", str(file), "--requests", "500")
    assert "every step is a plain one" in alone
    # Unasked: all usual loads, and the first tier's trees.
    every = tree("--tree", str(file))
    assert "trees: up to 1 running request " in every
    assert ["65", "on"] in [line.split()[:2] for line in every.splitlines()]


def test_contexts_that_are_asked_for(tree, tmp_path: Path) -> None:
    """Steps too dear for guesses while contexts are short."""
    rows, table = (1, 4, 16), ((0.01, 0.03, 0.09), (0.02, 0.06, 0.18))
    cost = ContextCost(128, 1e-4, 1e-4, 0.0)
    file, plan = str(tmp_path / "p.json"), str(tmp_path / "plan.json")
    LatencyProfile((1, 2), rows, table, {}, cost).save(file)
    short = tree("--profile", file, "--save", plan)
    assert "every step is a plain one" in short
    long = tree("--profile", file, "--context", "4000", "--requests", "1")
    assert "trees: " in long
    # The plan that was saved has both.
    for context, text in (("1", "every step is"), ("4000", "trees: ")):
        assert text in tree("--profile", file, "--tree", plan, "--context", context)


def test_every_line_on_request(tree) -> None:
    wide = ("--device", "cuda", "--rows", "40", "--no-ngram")
    few, all_ = tree(*wide, "--lines", "5"), tree(*wide, "--lines", "0")
    assert " more, each " in few
    assert " more, each " not in all_
    assert len(all_.splitlines()) > len(few.splitlines())


def test_a_measured_machine(tree, tmp_path: Path) -> None:
    key = {"device": "Slow Machine"}
    rows, table = (1, 4, 16), ((0.01, 0.0101, 0.0102), (0.02, 0.2, 0.8))
    LatencyProfile((1, 2), rows, table, key).save(tmp_path / "p.json")
    shown = tree("--profile", str(tmp_path / "p.json"))
    assert "Slow Machine" in shown
    (one,) = (line for line in shown.splitlines() if line.split()[:1] == ["1"])
    _, tau, mean_rows, _, ms, speed, gain = one.split()[:7]
    assert 10.0 <= float(ms) <= 10.2 and float(mean_rows) > 4
    assert float(speed) == pytest.approx(1000 * float(tau) / float(ms), rel=0.01)
    assert float(gain.rstrip("x")) == pytest.approx(float(speed) / 100, rel=0.01)
    assert "2 on" in shown and "plain decoding" in shown


def test_a_saved_plan_can_be_looked_at(tree, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shown = tree("--rows", "12", "--save", str(file))
    assert f"The plan is in {file}." in shown
    plan, _ = best_plan(EVIDENCE, default_profile("cpu"), 12)
    assert TreePlan.load(file) == plan
    again = tree("--tree", str(file))
    assert str(file) in again

    def panels(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("│", "╭", "╰"))]

    assert panels(again) == panels(shown) != []
    before = file.read_bytes()
    error = tree("--save", str(file), status=2)
    assert "is there already" in error
    assert file.read_bytes() == before
    tree("--rows", "4", "--save", str(file), "--overwrite")
    assert file.read_bytes() != before


@pytest.mark.parametrize("requests", ["1", "500"])
def test_the_picture(tree, tmp_path: Path, requests: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "trees.png"
    tree("--plot", str(file), "--requests", requests)
    assert file.read_bytes().startswith(b"\x89PNG")
    tree("--plot", str(tmp_path / "trees.svg"))
    assert "<svg" in (tmp_path / "trees.svg").read_text()


def test_other_terminals() -> None:
    plan, _ = best_plan(EVIDENCE, default_profile("cpu"), 12)
    figures = load_figures(plan, EVIDENCE, default_profile("cpu"), 1)
    for width in (50, 76, 200):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(trees_view(figures, "trees", console, 10, utf8=False))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        # Frames are the terminal library's to choose; the rest is plain.
        assert not set(text) & set("█◆" + LINES.child[0] + LINES.last[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rows", "1"], "--rows is 1; expected 2 to 129"),
        (["--rows", "-3"], "--rows is -3"),
        (["--lines", "-1"], "--lines is -1"),
        (["--context", "0"], "--context is 0; expected 1 or more tokens"),
        (["--profile", "nothing.json"], "the profile nothing.json cannot be read"),
        (["--tree", "nothing.json"], "cannot read the tree policy nothing.json"),
        (["--plot", "a.txt"], "expected a name ending in .png"),
        (["--plot", "no/folder/a.png"], "--plot is no/folder/a.png; expected a file"),
        (["--save", "."], "--save is .; expected a file"),
    ],
)
def test_errors_are_sentences(tree, argv: list[str], message: str) -> None:
    error = tree(*argv, status=2)
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["0", "x", "1,,2", "4,-1"])
def test_bad_loads(tree, text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        tree("--requests", text)
    assert "expected numbers of running requests" in capsys.readouterr().err


def test_plans_that_do_not_fit(tree, tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "plan.json"
    deep = TreePolicy((chain_tree(1, (0, 0)), chain_tree(1, (1, 1))))
    deep.save(file)
    assert "is for 1 prompt tokens" in tree("--tree", str(file), status=2)
    bare = chain_tree(0, (2,))
    TreePolicy((chain_tree(1, (0, 2)), bare, bare)).save(file)
    assert "only 0 prompt rows" in tree(
        "--tree", str(file), "--no-bigram", status=2
    )
    error = tree("--tree", str(file), "--rows", "3", status=2)
    assert "too small for the tree policy" in error
    two = TreePlan((Tier(None, (TreePolicy((bare, bare, bare)),) * 2),))
    file.write_text(json.dumps(two.to_dict()))
    assert "2 match classes" in tree("--tree", str(file), status=2)
