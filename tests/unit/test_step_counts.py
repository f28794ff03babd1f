"""What steps add up to, and how another process reads it."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from vllm_ppd.engine.step_counts import StepCounts, read_counts
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.layout import TreeStep
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree
from vllm_ppd.trees.verify import TreeWalk

# Node 1 and its child 2 continue an earlier match; 3 and 4 are other guesses.
FORKED = SparseTree((0, 1, 0, 3), (0, 0, 1, 0), (1, 0, 1, 1, 1))
BARE = chain_tree(0, (1,))


def step_and_walk(paths: list[list[int]]) -> tuple[TreeStep, TreeWalk]:
    """Requests in state 1 with a match, whose walks go along these nodes."""
    usual = TreePolicy((BARE, chain_tree(1, (1, 1))))
    tables = TreeTables(
        TreePlan((Tier(None, (usual, TreePolicy((BARE, FORKED)))),)), 50
    )
    trees = np.full(len(paths), 4)
    counts = tables.num_rows[trees]
    step = TreeStep(tables, trees, np.cumsum(counts) - counts, counts)
    tokens = np.arange(len(step.node_rows))
    walk = TreeWalk(step, tokens)
    level = 1
    going_on = True
    while going_on:
        picked = np.array(
            [
                tokens[step.first_nodes[b] + path[level - 1]]
                if level <= len(path)
                else -5
                for b, path in enumerate(paths)
            ]
        )
        going_on = walk.descend(picked)
        level += 1
    return step, walk


def values(folder) -> dict[str, float]:
    return {
        ",".join([name, *labels.values()]): value
        for name, labels, value in read_counts(folder)
    }


def test_counts_by_source_state_and_kind(tmp_path):
    counts = StepCounts(2, tmp_path, {"model_name": "m"})
    # Two from earlier text; a prompt row's and one deeper than prompt rows; none.
    step, walk = step_and_walk([[1, 2], [3, 4], []])
    counts.add(step, walk, np.array([1, 1, 1]))
    counts.add_plain(4)
    counts.set_plan(8, 2)
    assert values(tmp_path) == {
        "request_steps,speculating,m": 3,
        "request_steps,plain,m": 4,
        "emitted_tokens,m": 3 + 3 + 1 + 4,
        "rows,m": int(step.num_rows.sum()) + 4,
        "candidates,m": 12,
        "tier_max_requests,m": 8,
        "plan_changes,m": 2,
        "accepted_tokens,m,prompt_tokens": 1,
        "accepted_tokens,m,bigram": 1,
        "accepted_tokens,m,earlier_text": 2,
        "state_steps,m,0": 0,
        "state_steps,m,1": 3,
    }


def test_a_line_of_the_log():
    counts = StepCounts(2)
    counts.add_plain(100)
    since = np.array(counts.values)
    counts.add(*step_and_walk([[1, 2], [3, 4], []]), np.array([1, 1, 1]))
    counts.set_plan(None, 0)
    line = counts.line(since)
    assert line.startswith("PPD: 2.33 tokens and ")
    assert "guesses in 100% of steps; tier for any number of requests" in line
    assert "33% of candidates right, 25% from prompt tokens, 25% from succ" in line
    assert "50% from earlier text" in line and "0: 0%, 1: 100%" in line


def test_workers_add_up_and_damaged_files_are_left_out(tmp_path, monkeypatch):
    for worker, engine in ((1, "0"), (2, "0"), (3, "1")):
        monkeypatch.setattr("os.getpid", lambda worker=worker: worker)
        counts = StepCounts(1, tmp_path, {"engine": engine})
        counts.add_plain(worker)
    (tmp_path / "4.json").write_text("{")
    (tmp_path / "5.json").write_text('[["rows", {}]]')
    assert values(tmp_path)["rows,0"] == 3
    assert values(tmp_path)["rows,1"] == 3


def test_without_a_folder_counts_stay_here(tmp_path):
    StepCounts(2, tmp_path / "gone").add_plain(1)
    assert not list(tmp_path.iterdir())


def test_prometheus_shows_them(tmp_path):
    from vllm_ppd.engine import metrics  # imports vLLM

    counts = StepCounts(2, tmp_path, {"model_name": "m", "engine": "0"})
    counts.add(*step_and_walk([[1, 2]]), np.array([1]))
    counts.set_plan(None, 0)
    registry = CollectorRegistry()
    registry.register(metrics._PPDCollector(str(tmp_path)))
    text = generate_latest(registry).decode()
    source = 'engine="0",model_name="m",source="earlier_text"'
    assert f"vllm:ppd_accepted_tokens_total{{{source}}} 2.0" in text
    assert 'vllm:ppd_tier_max_requests{engine="0",model_name="m"} 0.0' in text
