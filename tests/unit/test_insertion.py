"""Many insertions in one pass are the insertions one by one, and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.unit.tiny_base import SIZES, tiny_llama
from vllm_ppd.train.forward import insertion_loss
from vllm_ppd.train.insertion import Insertion, sample_insertion
from vllm_ppd.train.loss import NO_TOKEN, Targets, prompt_loss
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.scores import token_rank
from vllm_ppd.train.settings import TrainingError

VOCAB, HIDDEN, LENGTH, BATCH = 61, 32, 20, 3
ALPHA = 0.8
# fp32: the two computations order their sums differently, nothing more.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}

# Where points may lie: everywhere, at the end, and in too few places for all of them.
ALLOWED = torch.arange(LENGTH) >= torch.tensor([0, 5, 14])[:, None]


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return FrozenModel(tiny_llama(VOCAB))


def make_batch(m: int, e: int):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    insertion = sample_insertion(ALLOWED, 5, m, e, generator)
    table = torch.randn(m, e, HIDDEN, generator=generator)
    return ids, insertion, table


def naive_loss(model, table, ids, insertion, kind):
    """Each point and ensemble member by itself, as an ordinary causal sequence."""
    m, e, _ = table.shape
    sums, counts = [torch.zeros(())] * m, [0] * m
    for b, k in itertools.product(*map(range, insertion.points.shape)):
        if not insertion.valid[b, k]:
            continue
        p = int(insertion.points[b, k])
        context = model.model.get_input_embeddings()(ids[b, : p + 1])
        members = []
        for j in range(e):
            inputs = torch.cat([context, table[:, j]])[None]
            members.append(model.model(inputs_embeds=inputs).logits[0, -m:])
        draft = torch.stack(members).mean(dim=0).log_softmax(dim=-1)
        own = model.model(ids[b, : p + m + 1][None]).logits[0, -m:]
        for i in range(m):
            after = p + 1 + i + 1
            if kind == "kl":
                target = own[i].log_softmax(dim=-1).detach()
                value = (target.exp() * (target - draft[i])).sum()
            elif after < LENGTH:
                value = -draft[i, ids[b, after]]
            else:
                continue
            sums[i] = sums[i] + value
            counts[i] += 1
    return sum(ALPHA**i * sums[i] / counts[i] for i in range(m))


def compare_with_naive_loop(model, batch, kind, *chunks: int, **tolerance) -> None:
    """Chunks are numbers of logits that are held at once."""
    ids, insertion, table = batch
    results = []
    for chunk in (0, *chunks):
        leaf = table.clone().requires_grad_()
        if chunk:
            how = {"alpha": ALPHA, "kind": kind, "chunk_elements": chunk}
            loss, _ = insertion_loss(model, leaf, ids, insertion, **how)
        else:
            loss = naive_loss(model, leaf, ids, insertion, kind)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], **tolerance)
    assert results[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["kl", "labels"])
@pytest.mark.parametrize("e", [1, 3])
def test_one_pass_equals_naive_loop(model, e: int, kind) -> None:
    batch = make_batch(m=3, e=e)
    assert 8 < batch[1].valid.sum() < batch[1].valid.numel()
    chunks = 1, VOCAB * e * 7, 1 << 30
    compare_with_naive_loop(model, batch, kind, *chunks, **TOLERANCE)


def test_sampled_points() -> None:
    m = 3
    middle = (torch.arange(LENGTH) >= 4) & (torch.arange(LENGTH) < 10)
    allowed = torch.cat([ALLOWED, middle[None]])
    insertion = sample_insertion(allowed, 12, m, 1, torch.Generator().manual_seed(0))
    for places, drawn, valid in zip(
        allowed, insertion.points, insertion.valid, strict=True
    ):
        points = drawn[valid].tolist()
        assert points == sorted(set(points))
        assert len(points) == min(12, int(places.sum()) - m)
        assert all(places[p : p + m + 1].all() for p in points)


def test_sampling_is_seeded_and_uniform() -> None:
    mask = torch.ones(400, 12).bool()
    draws = [
        sample_insertion(mask, 3, 2, 1, torch.Generator().manual_seed(seed)).points
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    counts = draws[0].flatten().bincount(minlength=10)
    # 400 * 3 draws over the ten places 0 .. 9; five standard deviations.
    assert counts.numel() == 10
    assert (counts - 120).abs().max() < 50


@pytest.mark.parametrize("elements", [1, 210, 1 << 30])
def test_scores_against_a_loop(elements: int) -> None:
    """With an identity head the hidden rows are the logits."""
    generator = torch.Generator().manual_seed(0)
    count, m, vocab = 40, 2, 30
    draft = torch.randn(count, m, 1, vocab, generator=generator)
    target = torch.randn(count, m, vocab, generator=generator)
    # Some predictions right, so that hits and near misses both occur.
    draft[::3, :, 0] = target[::3] + 0.3 * draft[::3, :, 0]
    tokens = torch.randint(vocab, (count, m), generator=generator)
    tokens[::5, 1] = NO_TOKEN
    on_path = torch.rand(count, m, generator=generator) < 0.5
    targets = Targets(target, tokens, on_path)
    options = {"alpha": 1.0, "with_scores": True, "chunk_elements": elements}
    _, scores = prompt_loss(draft, targets, torch.Tensor.float, **options)
    found = scores.summary()
    for i in range(m):
        order = draft[:, i, 0].argsort(dim=1, descending=True)
        best = target[:, i].argmax(dim=1)
        top1, top10 = order[:, 0] == best, (order[:, :10] == best[:, None]).any(1)
        known = tokens[:, i] != NO_TOKEN
        true10 = (order[:, :10] == tokens[:, i, None]).any(1)
        own, theirs = draft[:, i, 0].log_softmax(-1), target[:, i].softmax(-1)
        kl = F.kl_div(own, theirs, reduction="batchmean")
        path = on_path[:, i]
        assert found["model_top1"][i] == pytest.approx(top1.float().mean().item())
        assert found["model_top10"][i] == pytest.approx(top10.float().mean().item())
        assert found["greedy_top1"][i] == pytest.approx(top1[path].float().mean())
        assert found["true_top10"][i] == pytest.approx(true10[known].float().mean())
        assert found["kl"][i] == pytest.approx(kl.item(), rel=1e-4)


def test_greedy_path_is_where_the_model_agrees(model) -> None:
    """Text that the model wrote lies on its own greedy path everywhere."""
    ids = torch.randint(VOCAB, (2, 4), generator=torch.Generator().manual_seed(1))
    while ids.shape[1] < 16:
        following = model.model(ids).logits[:, -1].argmax(dim=-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
    points = torch.arange(4, 13).expand(2, -1)
    insertion = Insertion(points, torch.ones_like(points).bool(), 16, 3, 1)
    table = torch.randn(3, 1, HIDDEN)
    options = {"alpha": ALPHA, "with_scores": True, "with_greedy": True}
    _, scores = insertion_loss(model, table, ids, insertion, **options)
    assert scores.greedy.tolist() == [18, 18, 18]
    assert torch.equal(scores.greedy_top10, scores.model_top10)
    # Another token at 8: it is not what the model would have written after 7.
    ids[:, 8] = (ids[:, 8] + 1) % VOCAB
    points = torch.tensor([[5, 7], [5, 7]])
    insertion = Insertion(points, torch.ones_like(points).bool(), 16, 3, 1)
    _, scores = insertion_loss(model, table, ids, insertion, **options)
    # From root 5, predictions 1 and 2 precede the change; from root 7 none does.
    assert scores.greedy.tolist() == [2, 2, 0]


def test_rank_breaks_ties_like_argmax() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).expand(4, -1)
    assert token_rank(logits, torch.arange(4)).tolist() == [3, 0, 1, 2]


class Strange(transformers.LlamaForCausalLM):
    """Its logits are more than its head's output."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_models_that_are_not_understood_are_refused() -> None:
    with pytest.raises(TrainingError, match="computes its logits"):
        FrozenModel(Strange(tiny_llama(VOCAB).config))
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=VOCAB, initializer_range=0.3, **SIZES)
    with pytest.raises(TrainingError, match="see later ones"):
        FrozenModel(transformers.BertLMHeadModel(config))
    base = tiny_llama(VOCAB)
    base.config.sliding_window = 8
    with pytest.raises(TrainingError, match="8 tokens of sliding attention window"):
        FrozenModel(base, max_length=20)


FAMILIES = {
    "llama": {**SIZES, "attn_implementation": "eager"},
    "qwen2": {**SIZES, "use_sliding_window": False, "sliding_window": 4},
    # A window as long as the sequence is full attention.
    "gemma2": {**SIZES, "final_logit_softcapping": 5.0, "sliding_window": 64},
    "granite": {**SIZES, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_families_pass_the_same_comparison(family: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = FrozenModel(transformers.AutoModelForCausalLM.from_config(config).float())
    tolerance = {"rtol": 1e-3, "atol": 1e-5}
    compare_with_naive_loop(model, make_batch(m=2, e=1), "kl", 1 << 22, **tolerance)


def test_points_in_a_row():
    allowed = torch.ones(2000, 30).bool()
    allowed[:, :5] = False
    allowed[1000:, 12:] = False
    generator = torch.Generator().manual_seed(0)
    found = sample_insertion(allowed, 6, 2, 1, generator, in_a_row=True)
    # Places 5 .. 27, and only 5 .. 9 in the second half, all of which fit in a run.
    assert found.points.shape == (2000, 6)
    assert (found.valid[1000:].sum(dim=1) == 5).all()
    lengths = found.valid[:1000].sum(dim=1)
    assert lengths.min() == 1 and lengths.max() == 6
    for points, valid in zip(found.points, found.valid, strict=True):
        chosen = points[valid]
        assert (chosen.diff() == 1).all() and chosen[0] >= 5
    # No place is in a run more often than others, the first and the last included.
    often = torch.bincount(found.points[:1000][found.valid[:1000]], minlength=28)
    assert not often[:5].any()
    expected = 1000 * 6 / 28
    assert (often[5:28] - expected).abs().max() < 5 * expected**0.5
