"""Draft tokens and n-gram matches, against brute force."""

import numpy as np
import pytest
import torch

from tests.kernels.trees import random_drafting
from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.drafting import fill_trees, rank_children
from vllm_ppd.trees.ngram import MAX_NGRAM_DRAFTS, match_ngram, match_ngrams


def best_children(logits, parent, table, weight, excluded=-1) -> list[int]:
    """All tokens, best first, by the formula; of a table alone those that it lists."""
    if logits is None:
        order = [] if table is None else table.ids[parent].tolist()
    else:
        scores = logits.astype(np.float32).copy()
        if table is not None:
            gains = np.full(len(scores), table.floor[parent], np.float32)
            gains[table.ids[parent]] = table.gains[parent]
            scores += np.float32(weight) * gains
        order = np.argsort(-scores, kind="stable").tolist()
    return [token for token in order if token != excluded]


@pytest.mark.parametrize("has_bigram", [True, False])
@pytest.mark.parametrize("has_logits", [True, False])
def test_children_are_ranked_by_logit_and_gain(has_bigram, has_logits):
    rng = np.random.default_rng(0)
    table = random_drafting(0, has_bigram)[1]
    logits = rng.normal(size=(9, 200)).astype(np.float32)
    parents = rng.integers(0, 200, 9)
    excluded = rng.integers(-1, 200, 9)
    excluded[:3] = logits[:3].argmax(1)
    ranked = rank_children(
        torch.from_numpy(logits) if has_logits else None,
        torch.from_numpy(parents),
        None if table is None else BigramTensors.of(table),
        0.7,
        9,
        torch.from_numpy(excluded),
    )
    for row in range(9):
        own = logits[row] if has_logits else None
        best = best_children(own, parents[row], table, 0.7, excluded[row])[:9]
        assert ranked[row].tolist() == best + [-1] * (9 - len(best))


@pytest.mark.parametrize("has_bigram", [True, False])
def test_batches_against_one_node_at_a_time(has_bigram):
    for seed in range(20):
        tables, table, tree_ids, inputs = random_drafting(seed, has_bigram)
        weights = np.array(table.weights if table else (1.0,) * 3)
        bigram = None if table is None else BigramTensors.of(table)
        ids = fill_trees(tables, tree_ids, inputs, bigram, weights)
        counts, logits = inputs.num_prompted, inputs.logits.numpy()
        firsts = np.cumsum(counts) - counts
        for b, tree in enumerate(tree_ids):
            tokens = [inputs.roots[b]]
            for node in range(1, tables.num_nodes[tree]):
                parent, rank = tables.parents[tree, node], tables.node_ranks[tree, node]
                depth = tables.node_depths[tree, node]
                prompted = depth <= counts[b]
                own = logits[firsts[b] + depth - 1] if prompted else None
                ngram = -1
                if tables.on_ngram[tree, parent] and depth <= inputs.ngrams.shape[1]:
                    ngram = inputs.ngrams[b, depth - 1]
                weight = weights[depth - 1] if prompted else 0.0
                best = best_children(own, tokens[parent], table, weight, ngram)
                if ngram >= 0:
                    best = [ngram, *best]
                tokens.append(best[rank] if rank < len(best) else 0)
            nodes = len(tokens)
            assert ids[b, : nodes - 1].tolist() == tokens[1:]
            assert (ids[b, nodes - 1 :] == tables.soft_ids[tree, nodes:]).all()


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
