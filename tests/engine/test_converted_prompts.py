"""The authors' checkpoints and ensembles (EPT) in the engine: exact, and averaged.

Two engines decode: one loads a folder in the authors' layout, with two EPT; the other
one that `convert` wrote, with one. Their output must be plain vLLM's, and their guesses
those that the trainer's own forward pass makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.authors_checkpoint import write_authors_checkpoint
from tests.engine.conftest import MODEL, PROMPTS, cpu_only, engine_with, menu_file
from vllm_ppd.cli.convert import convert
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.insertion import Insertion
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

pytestmark = cpu_only

PARAMS = [{"temperature": 0.0, "ignore_eos": True, "max_tokens": n} for n in (90, 120)]


def policy(num_ept: int) -> TreePolicy:
    """Prompt tokens on both branches of a fork; row counts tell the states apart."""
    trees = (
        chain_tree(0, (3,), num_ept),
        SparseTree((0, 0), (0, 1), (3, 3, 1), num_ept),
        SparseTree((0, 0, 1), (0, 1, 2), (3, 2, 1, 3), num_ept),
        SparseTree((0, 0, 1, 3), (0, 1, 0, 1), (3, 1, 3, 2, 3), num_ept),
    )
    assert len({tree.num_rows for tree in trees}) == len(trees)
    return TreePolicy(trees)


@pytest.fixture(scope="module")
def frozen() -> FrozenModel:
    return FrozenModel.load(MODEL, dtype="float32")


@pytest.fixture(params=[False, True], ids=["theirs", "converted"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One trained EPT and one of noise, in the authors' layout; or the trained table,
    through the authors' older layout."""
    table, theirs = PromptTokens.load(PROMPTS).embeddings, tmp_path / "theirs"
    if request.param:
        write_authors_checkpoint(theirs, table, base=str(MODEL), pickled=True)
        convert(str(theirs), tmp_path / "ours", model=str(MODEL))
        return tmp_path / "ours"
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([table, 0.05 * noise], dim=1)
    return write_authors_checkpoint(theirs, mixed, base=str(MODEL))


def test_output_is_exact_and_drafts_are_the_trainers(
    check, ppd, ppd_engine, texts, folder, frozen, tmp_path
):
    prompts = PromptTokens.load(folder)
    trees = policy(prompts.num_ept)
    settings = {
        "model": str(folder),
        "tree": menu_file(tmp_path / "trees.json", (trees,)),
        # What prompt tokens propose, and nothing else.
        "bigram": False,
        "ngram": False,
    }
    assert check([texts[80][:200], texts[81][:500]], PARAMS, settings)[2] > 0

    engine = engine_with(ppd_engine, **settings)
    steps = ppd.call(
        "drafts_of_steps", engine, prompt=texts[82][:300], params=PARAMS[0], steps=40
    )
    num_prompted = [check_drafts(step, prompts, trees, frozen) for step in steps]
    assert len(num_prompted) == 40
    assert set(num_prompted) >= {1, 3}


def check_drafts(
    step: dict[str, Any], prompts: PromptTokens, trees: TreePolicy, frozen: FrozenModel
) -> int:
    """The draft tokens of a step are the best of the ensembles' averaged logits.

    Returns the step's num_prompted.
    """
    num_prompted, tree = next(
        (depth, tree)
        for depth, tree in enumerate(trees.trees)
        if tree.num_rows == 1 + len(step["drafts"])
    )
    m, e, _ = prompts.embeddings.shape
    ids = torch.tensor([step["ids"]])
    # The last token is the next root; the prompt rows hung on the one before it.
    length = ids.shape[1]
    points, valid = torch.tensor([[length - 2]]), torch.tensor([[True]])
    insertion = Insertion(points, valid, length, m, e)
    with torch.no_grad():
        ordinary = frozen.ordinary_rows(ids)
        rows = frozen.prompt_rows(prompts.embeddings, insertion, ordinary)
        logits = frozen.logits(insertion.split_points(rows))[0].mean(dim=1)
    ranked = logits.sort(dim=1, descending=True).values
    draft_tokens = zip(
        tree.node_depths[1:], tree.ranks, step["drafts"][: len(tree.ranks)], strict=True
    )
    for depth, rank, token in draft_tokens:
        # The two forward passes round differently: near-ties may swap.
        difference = ranked[depth - 1, rank] - logits[depth - 1, token]
        assert abs(difference) < 1e-3, (num_prompted, depth, rank)
    return num_prompted
