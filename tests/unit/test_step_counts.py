"""What steps add up to, and how another process reads it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from vllm_ppd.engine import counters
from vllm_ppd.engine.counters import StepCounts
from vllm_ppd.trees.layout import TreeStep, TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree
from vllm_ppd.trees.verify import TreeWalk

# Node 1 and its child 2 are the n-gram draft; 3 and 4 are other draft tokens.
FORKED = SparseTree((0, 1, 0, 3), (0, 0, 1, 0), (1, 0, 1, 1, 1))
ROOT = chain_tree(0, (1,))
USUAL = TreePolicy((ROOT, chain_tree(1, (1, 1))))
TABLES = TreeTables(TreeMenu((MenuEntry((USUAL, TreePolicy((ROOT, FORKED)))),)), 50)
ONE = np.array([1])


def step_and_walk(paths: list[list[int]]) -> tuple[TreeStep, TreeWalk]:
    """Requests with num_prompted 1 and an n-gram match, whose walks go along these
    nodes."""
    tree_ids = np.full(len(paths), 4)
    counts = TABLES.num_rows[tree_ids]
    step = TreeStep(TABLES, tree_ids, np.cumsum(counts) - counts, counts)
    tokens = np.arange(len(step.node_rows))
    walk, picked = TreeWalk(step, tokens), np.full(len(tokens), -5)
    for first, path in zip(step.first_nodes, paths, strict=True):
        for parent, child in pairwise([0, *path]):
            picked[first + parent] = tokens[first + child]
    walk.run_greedy(picked)
    return step, walk


def add(counts: StepCounts, paths: list[list[int]]) -> None:
    step, walk = step_and_walk(paths)
    ones = np.ones(len(paths), dtype=int)
    counts.add(TABLES, step.tree_ids, step.num_rows, walk.lengths, walk.paths, ones)


def values(folder) -> dict[str, float]:
    return {
        ",".join([family.name.removeprefix("vllm:ppd_"), *sample.labels.values()]): (
            sample.value
        )
        for family in counters._PPDCollector(str(folder)).collect()
        for sample in family.samples
    }


def test_counts_by_source_num_prompted_and_kind(tmp_path):
    counts = StepCounts(2, tmp_path, {"model_name": "m"})
    # Two of the n-gram draft; a prompt row's and one deeper than prompt rows; none.
    add(counts, [[1, 2], [3, 4], []])
    counts.add_plain(4)
    assert values(tmp_path) == {
        "request_steps,speculating,m": 3,
        "request_steps,plain,m": 4,
        "emitted_tokens,m": 3 + 3 + 1 + 4,
        "rows,m": 3 * FORKED.num_rows + 4,
        "draft_tokens,m": 12,
        "accepted_tokens,m,prompt": 1,
        "accepted_tokens,m,bigram": 1,
        "accepted_tokens,m,ngram": 2,
        "num_prompted_steps,m,0": 0,
        "num_prompted_steps,m,1": 3,
    }


def test_padding_is_neither_a_draft_token_nor_speculation():
    counts = StepCounts(2)
    # Of 9 scheduled rows the root-only tree has 1 and the forked one all nodes.
    paths = np.zeros((2, 3), dtype=int)
    zeros = np.zeros(2, dtype=int)
    counts.add(TABLES, np.array([0, 4]), np.full(2, 9), zeros + 1, paths, zeros)
    names = [slot.name for slot in counters.Slot]
    shown = dict(zip(names, counts.values.tolist(), strict=False))
    assert (shown["SPECULATING"], shown["PLAIN"]) == (1, 1)
    assert (shown["TOKENS"], shown["ROWS"], shown["DRAFT_TOKENS"]) == (2, 18, 4)


def test_every_eighth_step_counts_and_lines_are_logged(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(counters.time, "monotonic", lambda: now[0])
    log = StepCounts(2)
    step, walk = step_and_walk([[1, 2]])
    for _ in range(16):
        log.after_step(step, walk, ONE)
    for _ in range(7):
        log.after_plain_step(5)
    # A line says what came since the one before it.
    lines: list[str] = []
    monkeypatch.setattr(counters.logger, "info", lines.append)
    now[0] = 11.0
    log.after_plain_step(2)
    assert lines == [
        "PPD: acceptance length 2.00, 5.0 rows per request and step, drafts in 50% of "
        "steps; 50% of draft tokens accepted: prompt 0%, bigram 0%, ngram 100%"
    ]
    for _ in range(8):
        log.after_plain_step(5)
    assert log.line().startswith("PPD: acceptance length 1.00, 1.0 rows")


def test_workers_add_up_and_damaged_files_are_left_out(tmp_path):
    """Also those of one process, as engines without processes of their own are."""
    workers = [
        StepCounts(2 - int(engine), tmp_path, {"engine": engine}) for engine in "001"
    ]
    for requests, counts in enumerate(workers, start=1):
        counts.add_plain(requests)
    (tmp_path / "4.json").write_text("{")
    (tmp_path / "5.json").write_text('[["rows", {}]]')
    assert values(tmp_path)["rows,0"] == 3
    assert values(tmp_path)["rows,1"] == 3


def test_without_a_folder_counts_stay_here(tmp_path):
    StepCounts(2, tmp_path / "gone").add_plain(1)
    assert not list(tmp_path.iterdir())


def test_prometheus_shows_them(tmp_path):
    counts = StepCounts(2, tmp_path, {"model_name": "m", "engine": "0"})
    add(counts, [[1, 2]])
    registry = CollectorRegistry()
    registry.register(counters._PPDCollector(str(tmp_path)))
    text = generate_latest(registry).decode()
    source = 'engine="0",model_name="m",source="ngram"'
    assert f"vllm:ppd_accepted_tokens_total{{{source}}} 2.0" in text
