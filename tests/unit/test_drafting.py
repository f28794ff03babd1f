"""Draft tokens and n-gram matches, against brute force."""

import numpy as np
import pytest
import torch

from tests.unit.test_tree import random_tree
from vllm_ppd.trees.bigram import BigramTable, BigramTensors
from vllm_ppd.trees.drafting import DraftInputs, fill_trees, rank_children
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS, match_ngram, match_ngrams
from vllm_ppd.trees.tree import SparseTree, TreePolicy

VOCABULARY = 24


def random_bigram(rng: np.random.Generator) -> BigramTable:
    ids = np.stack([rng.permutation(VOCABULARY)[:5] for _ in range(VOCABULARY)])
    gains = np.sort(rng.normal(size=ids.shape) + 1, axis=1)[:, ::-1]
    floor = gains[:, -1] - rng.random(VOCABULARY)
    return BigramTable(ids, gains, floor, (1.0, 0.7), np.full(VOCABULARY, 0.1))


def best_children(logits, parent, table, weight, excluded=-1) -> list[int]:
    """All tokens, best first, by the formula; of a table alone those that it lists."""
    if logits is None:
        order = [] if table is None else table.ids[parent].tolist()
    else:
        scores = logits.astype(np.float32).copy()
        if table is not None:
            gains = np.full(VOCABULARY, table.floor[parent], np.float32)
            gains[table.ids[parent]] = table.gains[parent]
            scores += np.float32(weight) * gains
        order = np.argsort(-scores, kind="stable").tolist()
    return [token for token in order if token != excluded]


@pytest.mark.parametrize("has_bigram", [True, False])
@pytest.mark.parametrize("has_logits", [True, False])
def test_children_are_ranked_by_logit_and_gain(has_bigram, has_logits):
    rng = np.random.default_rng(0)
    table = random_bigram(rng) if has_bigram else None
    logits = rng.normal(size=(9, VOCABULARY)).astype(np.float32)
    parents = rng.integers(0, VOCABULARY, 9)
    excluded = rng.integers(-1, VOCABULARY, 9)
    ranked = rank_children(
        torch.from_numpy(logits) if has_logits else None,
        torch.from_numpy(parents),
        None if table is None else BigramTensors.of(table),
        0.7,
        4,
        torch.from_numpy(excluded),
    )
    for row in range(9):
        own = logits[row] if has_logits else None
        best = best_children(own, parents[row], table, 0.7, excluded[row])[:4]
        assert ranked[row].tolist() == best + [-1] * (4 - len(best))


@pytest.mark.parametrize("has_bigram", [True, False])
def test_batches_against_one_node_at_a_time(has_bigram):
    rng = np.random.default_rng(1)
    table = random_bigram(rng) if has_bigram else None
    for _ in range(20):
        trees = []
        while len(trees) < 3:
            tree = random_tree(rng)
            prompts = np.minimum(tree.prompts, 2)
            trees.append(SparseTree(tree.parents, tree.ranks, tuple(prompts)))
        if all(tree.num_rows < 2 for tree in trees):
            continue
        policy = TreePolicy(tuple(trees))
        menu = TreeMenu((MenuEntry((policy, policy)),))
        tables = TreeTables(menu, 100)
        batch = 6
        num_prompted = rng.integers(0, 3, batch)
        matched = rng.integers(0, 2, batch)
        tree_ids = 1 + 3 * matched + num_prompted
        logits = rng.normal(size=(num_prompted.sum(), VOCABULARY)).astype(np.float32)
        roots = rng.integers(0, VOCABULARY, batch)
        ngrams = rng.integers(0, VOCABULARY, (batch, 3))
        ngrams[np.arange(3) >= rng.integers(0, 4, (batch, 1))] = -1
        weights = np.array([1.0, 0.7])
        ids = fill_trees(
            tables,
            tree_ids,
            DraftInputs(num_prompted, torch.from_numpy(logits), roots, ngrams),
            None if table is None else BigramTensors.of(table),
            weights,
        )
        firsts = np.cumsum(num_prompted) - num_prompted
        for b in range(batch):
            tree = menu.trees[tree_ids[b]]
            tokens = [roots[b]]
            for node, (parent, rank) in enumerate(
                zip(tree.parents, tree.ranks, strict=True), start=1
            ):
                depth = tree.node_depths[node]
                prompted = depth <= num_prompted[b]
                own = logits[firsts[b] + depth - 1] if prompted else None
                ngram = -1
                if matched[b] and tree.ngram_path[parent] and depth <= 3:
                    ngram = ngrams[b, depth - 1]
                weight = weights[depth - 1] if prompted else 0.0
                best = best_children(own, tokens[parent], table, weight, ngram)
                if ngram >= 0:
                    best = [ngram, *best]
                tokens.append(best[rank] if rank < len(best) else 0)
            assert ids[b, : tree.num_nodes - 1].tolist() == tokens[1:]
            soft = [100 + index for _, index, _ in tree.prompt_rows]
            assert ids[b, tree.num_nodes - 1 : tree.num_rows - 1].tolist() == soft
            assert not ids[b, tree.num_rows - 1 :].any()


def test_matches():
    # 7 8 came before, followed by 1 2 3 ...
    match_class, draft = match_ngram(np.array([7, 8, 1, 2, 3, 9, 7, 8]))
    assert (match_class, draft.tolist()) == (1, [1, 2, 3, 9, 7, 8])
    match_class, draft = match_ngram(np.array([5, 6, 7, 8, 1, 5, 6, 7, 8]))
    assert (match_class, draft.tolist()) == (2, [1, 5, 6, 7, 8])
    assert match_ngram(np.array([1, 2, 3]))[0] == 0
    assert match_ngram(np.array([4]))[0] == 0
    # One token is no match; the draft has a limit.
    assert match_ngram(np.array([1, 2, 1]))[0] == 0
    assert len(match_ngram(np.tile([1, 2, 3], 20))[1]) == MAX_NGRAM_DRAFTS


def brute_force(context):
    n = len(context)
    for length in range(min(8, n - 1), 1, -1):
        for end in range(length, n):
            if context[end - length : end] == context[n - length :]:
                return (2 if length >= 4 else 1), context[end : end + MAX_NGRAM_DRAFTS]
    return 0, []


def test_matches_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(400):
        context = rng.integers(0, int(rng.integers(2, 6)), int(rng.integers(1, 30)))
        match_class, draft = match_ngram(context)
        assert (match_class, draft.tolist()) == brute_force(context.tolist())


def test_matches_of_a_batch_search_the_last_tokens_only():
    tokens = np.array([[7, 8, 1, 2, 3, 9, 7, 8], [7, 8, 1, 7, 8, 0, 0, 0]])
    classes, drafts = match_ngrams(tokens, np.array([8, 5]), context=6)
    # The earlier 7 8 of request 0 lies before its last 6 tokens.
    assert classes.tolist() == [0, 1]
    assert drafts[0].tolist() == [-1] * MAX_NGRAM_DRAFTS
    assert drafts[1].tolist() == [1, 7, 8] + [-1] * (MAX_NGRAM_DRAFTS - 3)
