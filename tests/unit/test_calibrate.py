"""Calibration counts what decoding would see."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.unit.tiny_base import tiny_llama
from vllm_ppd.calibrate.measure import Measurement, measure
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.train.continuation import continue_prompts, end_tokens
from vllm_ppd.train.data import TokenStream, prompt_starts
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.settings import TrainingError
from vllm_ppd.trees.drafting import DraftInputs, fill_trees
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

# END is a token that some greedy continuations below meet halfway.
VOCAB, HIDDEN, END = 53, 32, 25
PROMPT, WRITTEN = 6, 14
# Every place of every continuation becomes a point.
SETTINGS = CalibrationSettings(
    points=10_000,
    points_per_prompt=WRITTEN,
    prompt_length=PROMPT,
    continuation=WRITTEN,
    ranks=VOCAB,
    batch_size=3,
)


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return FrozenModel(tiny_llama(VOCAB, seed=1, eos_token_id=END, bos_token_id=None))


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    generator = torch.Generator().manual_seed(5)
    return TokenStream(torch.randint(1, VOCAB, (8 * PROMPT + 3,), generator=generator))


def table(m: int, e: int) -> torch.Tensor:
    return torch.randn(m, e, HIDDEN, generator=torch.Generator().manual_seed(m * e))


def written_by(model: FrozenModel, prompt: list[int]) -> list[int]:
    """The greedy continuation, each token from a whole forward pass of its own."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + WRITTEN:
        logits = model.model(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == END:
            break
    return tokens


@torch.no_grad()
def prompt_logits(model, prompts, context: list[int]) -> torch.Tensor:
    """[m, vocabulary]: prompt rows after a context, by a pass of their own."""
    m, e, _ = prompts.shape
    embedded = model.embed(torch.tensor(context))
    members = [
        model.model(inputs_embeds=torch.cat([embedded, prompts[:, j]])[None]).logits
        for j in range(e)
    ]
    return torch.stack(members).mean(dim=0)[0, -m:]


def wide_trees(m: int, ranks: int) -> TreeTables:
    """The last tree has all ranks at each depth, below the best of the depth before."""
    parents = [0, *range(1, m * ranks, ranks)][:m]
    nodes = np.repeat(parents, ranks).tolist(), [*range(ranks)] * m
    wide = SparseTree(*map(tuple, nodes), (m,) + (0,) * m * ranks)
    chains = [chain_tree(depth, (m,) * (depth + 1)) for depth in range(m)]
    return TreeTables(TreePolicy((*chains, wide)), first_soft_id=VOCAB)


@pytest.mark.parametrize(("m", "e"), [(3, 1), (2, 3)])
@torch.no_grad()
def test_counts_are_those_of_points_one_by_one(model, stream, m, e, monkeypatch):
    """And those of draft tokens in the tree of the next step that turn out right."""
    prompts, ranks = table(m, e), 5
    counts, hits = np.zeros((m, VOCAB)), np.zeros((m, ranks))
    trees, last, no_ngrams = wide_trees(m, ranks), np.array([m]), np.full((1, 4), -1)
    total = 0
    for start in prompt_starts(stream, PROMPT).tolist():
        tokens = written_by(model, stream.tokens[start : start + PROMPT].tolist())
        for root in range(PROMPT, len(tokens) - m - 1):
            logits = prompt_logits(model, prompts, tokens[: root + 1])
            total += 1
            for d in range(1, m + 1):
                best = logits[d - 1].argsort(descending=True).tolist()
                counts[d - 1, best.index(tokens[root + 1 + d])] += 1
            # The token that follows is the next step's root.
            follows, *future = tokens[root + 1 : root + 2 + m]
            inputs = DraftInputs(last, logits.float(), np.array([follows]), no_ngrams)
            (drafts,) = fill_trees(trees, last, inputs, None, np.zeros(m))
            hits += drafts[: m * ranks].reshape(m, ranks) == np.array(future)[:, None]
    assert total > 30 and hits.sum() > 3
    assert (hits == counts[:, :ranks]).all()
    whole = measure(model, prompts, stream, SETTINGS)
    # The same again with the prompt rows of one point at a time.
    monkeypatch.setattr("vllm_ppd.calibrate.measure._ROWS_AT_ONCE", 1)
    monkeypatch.setattr("vllm_ppd.calibrate.measure._CHUNK_ELEMENTS", 1)
    for found in (whole, measure(model, prompts, stream, SETTINGS)):
        assert found.num_points == total
        np.testing.assert_allclose(found.acceptance(VOCAB), counts / total, atol=1e-12)
    few = whole.acceptance(4)
    assert few.shape == (m, 4)
    np.testing.assert_allclose(few, counts[:, :4] / total, atol=1e-12)


def test_greedy_and_sampled_continuations(model, stream):
    starts = prompt_starts(stream, PROMPT)
    prompts, _ = stream.windows(starts, PROMPT)
    generator = torch.Generator().manual_seed(0)
    greedy = continue_prompts(model, prompts, WRITTEN, 0.0, generator)
    for row, prompt in enumerate(prompts.tolist()):
        expected = written_by(model, prompt)
        kept = PROMPT + int(greedy.written[row].sum())
        assert greedy.tokens[row, :kept].tolist() == expected
        assert not greedy.written[row, :PROMPT].any()
        assert greedy.written[row, PROMPT:kept].all()
    assert end_tokens(model) == [END]
    assert greedy.written.sum(dim=1).unique().numel() > 2
    # Sampling: the first token's frequencies are the model's probabilities.
    many = prompts[:1].expand(4000, -1)
    drawn = continue_prompts(model, many, 1, 1.7, generator).tokens[:, -1]
    logits = model.model(prompts[:1]).logits[0, -1]
    expected = (logits / 1.7).softmax(dim=0)
    observed = torch.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert (observed - expected).abs().max() < 4 * math.sqrt(0.25 / len(drawn))
    assert observed.max() < 0.99


def test_same_seed_same_figures(model, stream):
    settings = dataclasses.replace(SETTINGS, temperature=1.0, points_per_prompt=4)
    runs = [dataclasses.replace(settings, seed=seed) for seed in (1, 1, 2)]
    ranks = [measure(model, table(2, 1), stream, run).ranks for run in runs]
    assert torch.equal(ranks[0], ranks[1])
    assert not torch.equal(ranks[0], ranks[2])
    # It stops at the points asked for.
    settings = dataclasses.replace(SETTINGS, points=8, points_per_prompt=4)
    found = measure(model, table(2, 1), stream, settings)
    assert 8 <= found.num_points < 12
    assert found.num_prompts <= 3


def test_prompts_of_chats_end_where_the_assistant_writes():
    allowed = torch.zeros(40, dtype=torch.bool)
    allowed[[3, 10, 11, 12, 30]] = True
    starts = prompt_starts(TokenStream(torch.arange(40), allowed), 5)
    assert starts.tolist() == [5, 25]
    with pytest.raises(TrainingError, match="no prompt of 35 tokens"):
        prompt_starts(TokenStream(torch.arange(40), allowed), 35)


def test_intervals():
    # Wilson at 40 of 100, worked out by hand: centre .4038, [.3094, .4980].
    hits = torch.cat([torch.zeros(40), torch.ones(60)]).long()[:, None]
    apart = Measurement(hits, torch.arange(100))
    assert apart.effective_points()[0] == pytest.approx(99.0)
    assert 0.0943 < apart.half_widths()[0] < 0.0955
    # Ten equal points in each of ten continuations say no more than ten points.
    together = Measurement(hits, torch.arange(100) // 10)
    assert together.effective_points()[0] == pytest.approx(9.0)
    never = Measurement(hits * 0 + 1, torch.arange(100))
    assert 0 < never.half_widths()[0] < 0.02


def test_a_model_that_ends_at_once(stream):
    silent = FrozenModel(tiny_llama(VOCAB))
    silent.model.generation_config.eos_token_id = list(range(VOCAB))
    with pytest.raises(TrainingError, match="after none of 8 prompts"):
        measure(silent, table(2, 1), stream, SETTINGS)


def test_text_is_dealt_in_pieces_from_all_over():
    for total, size in ((100_000, 40_000), (1_000_000, 20_000), (3_000, 1_500)):
        tokens = torch.arange(total, dtype=torch.int32)
        rest, dealt = TokenStream(tokens, tokens % 2 == 0).deal(size)
        assert rest.tokens.numel() + dealt.tokens.numel() == total
        assert torch.cat([rest.tokens, dealt.tokens]).unique().numel() == total
        assert dealt.tokens.numel() == pytest.approx(size, rel=0.4)
        assert torch.equal(dealt.allowed, dealt.tokens % 2 == 0)
        for part in (rest, dealt):
            assert (part.tokens.diff() > 0).all()
            # The middle of the text is the middle of either part.
            assert part.tokens.float().mean() == pytest.approx(total / 2, rel=0.5)
        if total > 10_000:
            assert (dealt.tokens.diff() > 1).sum() >= 1
