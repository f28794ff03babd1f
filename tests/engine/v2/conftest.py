"""A tiny random model, trees that branch, and engines on both runners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_process import GPU_MEMORY, ON_GPU, EngineProcess
from tests.engine.v2.engine import HAS_TRITON, V2EngineProcess
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, save_menus
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

VOCABULARY = 24


def same(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> None:
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        for key in ("ids", "finish", "stop"):
            assert b[key] == a[key], f"request {index} differs in {key}"


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
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    LlamaForCausalLM(config).float().save_pretrained(folder)
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
    chains = TreePolicy(
        tuple(chain_tree(min(s, 1), (1,) * (min(s, 1) + 1), 2) for s in range(4))
    )
    menu = TreeMenu((MenuEntry((chains,)), MenuEntry((bushy,))))
    path = tmp_path_factory.mktemp("trees") / "trees.json"
    save_menus(path, menu, menu)
    return str(path)


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: str) -> dict[str, Any]:
    return {
        "model": tiny_model,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
        "seed": 0,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **GPU_MEMORY,
    }


@pytest.fixture(scope="session")
def tiny_ppd(
    tiny_engine: dict[str, Any], tiny_prompts: str, tiny_trees: str
) -> dict[str, Any]:
    return {
        **tiny_engine,
        "speculative_config": {
            "method": "ppd",
            "model": tiny_prompts,
            "tree": tiny_trees,
            "profile": "none",
            # V1 would learn which tokens follow which, and draft better than V2.
            "online": False,
        },
    }


@pytest.fixture
def check(
    plain: V2EngineProcess,
    ppd: V2EngineProcess,
    tiny_engine: dict[str, Any],
    tiny_ppd: dict[str, Any],
) -> Any:
    """Called with requests, parameters and engine arguments: decodes them plainly and
    with PPD, compares, and returns both outputs and the accepted draft tokens."""

    def decode(requests: list[Any], params: Any, **more: Any) -> Any:
        engine = {**tiny_ppd, **more}
        before = ppd.accepted(engine)
        expected = plain.generate({**tiny_engine, **more}, requests, params)
        actual = ppd.generate(engine, requests, params)
        same(expected, actual)
        return expected, actual, ppd.accepted(engine) - before

    return decode


@pytest.fixture(scope="session")
def v1() -> Iterator[EngineProcess]:
    if ON_GPU:
        pytest.skip("on a GPU the V1 runner serves 16-bit models only")
    process = EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def plain() -> Iterator[V2EngineProcess]:
    """For engines without PPD."""
    process = V2EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def ppd() -> Iterator[V2EngineProcess]:
    """For engines with PPD, which schedule ahead of the device as on GPUs."""
    process = V2EngineProcess(asynchronous=True)
    yield process
    process.stop()
