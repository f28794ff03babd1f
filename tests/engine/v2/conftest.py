"""A tiny random model, trees that branch, and engines on both runners."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import DEMO, DEMO_PPD, menu_file, same
from tests.engine.engine_process import ON_GPU, EngineProcess
from tests.engine.v2.engine import HAS_TRITON, V2EngineProcess
from tests.unit.tiny_base import tiny_llama
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

VOCABULARY = 24
GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


def prompts(count: int, seed: int = 0, length: int | None = None) -> list[Any]:
    """Random prompts of a few to some dozen tokens."""
    chosen = random.Random(seed)
    return [
        {
            "prompt_token_ids": [
                chosen.randrange(2, VOCABULARY)
                for _ in range(length or chosen.randint(2, 40))
            ]
        }
        for _ in range(count)
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(
        reason="vLLM's V2 runner needs Triton (pip install triton), interpreted here"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if not HAS_TRITON:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers of random weights, large enough that its greedy text wanders."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512}
    model = tiny_llama(VOCABULARY, initializer_range=0.2, **sizes, **tokens)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_prompts(tiny_model: str) -> str:
    """Three prompt tokens of random noise, two EPTs each: right by chance."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 2, 64, generator=generator) * 0.2
    base = BaseModelFingerprint.of_folder(tiny_model, name=tiny_model)
    folder = Path(tiny_model).parent / "prompts"
    PromptTokens(rows, base).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_trees(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small bushy trees: with so few words a draft token is right every few steps. A
    shorter entry has chains."""
    wide = SparseTree((0, 0, 0, 1, 1, 4), (0, 1, 2, 0, 1, 0), (3, 2, 1, 0, 1, 3, 1), 2)
    middle = SparseTree(
        (0, 0, 0, 1, 1, 2), (0, 1, 2, 0, 1, 2), (3, 2, 2, 1, 1, 1, 1), 2
    )
    narrow = SparseTree((0,) * 6, tuple(range(6)), (3, 2, 2, 2, 1, 1, 1), 2)
    bushy = TreePolicy((chain_tree(0, (3,), 2), narrow, middle, wide))
    chains = TreePolicy((chain_tree(0, (1,), 2), *[chain_tree(1, (1, 1), 2)] * 3))
    path = tmp_path_factory.mktemp("trees") / "trees.json"
    return menu_file(path, (chains,), (bushy,))


@pytest.fixture(scope="session")
def plain_engine(tiny_model: str) -> dict[str, Any]:
    return {
        **DEMO,
        "model": tiny_model,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "skip_tokenizer_init": True,
    }


@pytest.fixture(scope="session")
def ppd_engine(plain_engine: Any, tiny_prompts: str, tiny_trees: str) -> dict[str, Any]:
    # V1 would learn which tokens follow which, and draft better than V2.
    settings = {"model": tiny_prompts, "tree": tiny_trees, "online": False}
    return {**plain_engine, "speculative_config": {**DEMO_PPD, **settings}}


@pytest.fixture
def watch(plain: Any, ppd: Any, plain_engine: Any, ppd_engine: Any) -> Any:
    """Called with requests, parameters and perhaps an engine with PPD and a schedule:
    compares like check; returns what generate_and_watch does."""

    def decode(requests: Any, params: Any, engine: Any = None, **how: Any) -> Any:
        expected = plain.generate(plain_engine, requests, params)
        how |= {"prompts": requests, "params": params}
        watched = ppd.call("v2.engine:generate_and_watch", engine or ppd_engine, **how)
        same(expected, watched["outputs"])
        return watched

    return decode


@pytest.fixture(scope="session")
def v1(start_once: Any) -> EngineProcess:
    if ON_GPU:
        pytest.skip("on a GPU the V1 runner serves 16-bit models only")
    return start_once()


@pytest.fixture(scope="session")
def plain(start_once: Any) -> V2EngineProcess:
    """For engines without PPD."""
    return start_once(V2EngineProcess)


@pytest.fixture(scope="session")
def ppd(start_once: Any) -> V2EngineProcess:
    """For engines with PPD, which schedule ahead of the device as on GPUs."""
    return start_once(V2EngineProcess, asynchronous=True)
