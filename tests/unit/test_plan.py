"""Plans: tiers of load, tree ids, files."""

import json

import pytest

from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreeError, TreePolicy, chain_tree

SMALL = TreePolicy((chain_tree(0, (1,)), chain_tree(1, (1, 1))))
FORK = TreePolicy((chain_tree(0, (1,)), SparseTree((0, 0, 1), (0, 1, 0), (1, 1, 0, 0))))
PLAN = TreePlan((Tier(1, (FORK, SMALL)), Tier(8, (SMALL, SMALL)), Tier(None)))


def test_tiers_by_load():
    assert [PLAN.tier_index(n) for n in (1, 2, 8, 9, 500)] == [0, 1, 1, 2, 2]
    # One bare root, then tier, class, state.
    assert PLAN.trees == (chain_tree(0, (0,)), *FORK.trees, *SMALL.trees * 3)
    assert PLAN.first_trees == (1, 5, 0)
    assert PLAN.chained == (False, False, False, True, True, False, False, True, True)
    assert (PLAN.num_classes, PLAN.num_prompt_tokens, PLAN.max_rows) == (2, 1, 6)


def test_a_chain_is_the_first_child_of_the_first_child():
    plan = TreePlan((Tier(None, (FORK, FORK)),))
    tables = TreeTables(plan, first_soft_id=100)
    # Tree 2 is class 0, state 1; tree 4 the same of class 1. Node 3 is below node 1.
    assert tables.on_ngram[2].tolist() == [False] * 4
    assert tables.on_ngram[4].tolist() == [True, True, False, True]


def test_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_dict()))
    assert TreePlan.load(path) == PLAN
    FORK.save(path)
    assert TreePlan.load(path) == TreePlan.of(FORK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "format is 'other'"),
        (lambda d: d.update(extra=1), "unknown key 'extra' in the plan"),
        (lambda d: d["tiers"][0].pop("policies"), "'policies' is missing in the tier"),
        (lambda d: d["tiers"][0].update(max_requests=0), "max_requests is 0"),
        (lambda d: d["tiers"][1].update(max_requests=1), "must rise"),
        (lambda d: d["tiers"][0].update(max_context=0), "max_context is 0"),
        (lambda d: d["tiers"][0].update(max_context=512), "last tier"),
        (lambda d: d["tiers"][2].update(max_context=512), "last tier"),
        (
            lambda d: [tier.update(max_context=512) for tier in d["tiers"]],
            "last context range",
        ),
        (lambda d: d["tiers"][2].update(max_requests=99), "last tier"),
        (lambda d: d["tiers"][1]["policies"].pop(), "same number of match classes"),
        (lambda d: d.update(tiers=[]), "at least one tier"),
    ],
)
def test_bad_files(tmp_path, change, message):
    data = PLAN.to_dict()
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(TreeError, match=message):
        TreePlan.load(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(TreeError, match="cannot read"):
        TreePlan.load(tmp_path / "nothing.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(TreeError, match="is not JSON"):
        TreePlan.load(tmp_path / "plan.json")
