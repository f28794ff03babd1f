"""Engines and models that the engine tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_process import GPU_MEMORY, ON_GPU, EngineProcess
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, save_menus
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "demo_model" / "model"
PROMPTS = ROOT / "trained_prompts" / "demo"
# Tests that look into the V1 runner, or need several devices or none.
cpu_only = pytest.mark.skipif(ON_GPU, reason="about engines on a CPU")


@pytest.fixture(scope="session")
def plain() -> Iterator[EngineProcess]:
    process = EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def ppd() -> Iterator[EngineProcess]:
    process = EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Held-out Python sources."""
    lines = (ROOT / "demo_model" / "held_out.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tree menus of one policy by name, as files."""
    wide = SparseTree(
        (0, 0, 0, 0, 1, 1, 2, 5), (0, 1, 2, 3, 0, 1, 0, 0), (3, 3, 2, 1, 1, 3, 3, 2, 3)
    )
    wide2 = SparseTree((0, 0, 1, 1, 2), (0, 1, 0, 2, 1), (3, 3, 2, 2, 0, 3))
    wide1 = SparseTree((0, 0, 0), (0, 1, 2), (3, 2, 2, 1))
    root = chain_tree(0, (3,))
    policies = {
        "prompt_rows_only": TreePolicy((root, root, root, root)),
        "chain": TreePolicy(
            (
                chain_tree(0, (3,)),
                chain_tree(1, (3, 3)),
                chain_tree(2, (3, 3, 3)),
                chain_tree(3, (3, 3, 3, 3)),
            )
        ),
        "wide": TreePolicy((chain_tree(0, (3,)), wide1, wide2, wide)),
    }
    folder = tmp_path_factory.mktemp("trees")
    for name, policy in policies.items():
        menu = TreeMenu((MenuEntry((policy,)),))
        save_menus(folder / f"{name}.json", menu, menu)
    return {name: str(folder / f"{name}.json") for name in policies}


@pytest.fixture(scope="session")
def noise_prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompt tokens that predict nothing: random noise."""
    trained = PromptTokens.load(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(trained.embeddings.shape, generator=generator)
    folder = tmp_path_factory.mktemp("noise") / "prompts"
    PromptTokens(noise, trained.base).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plain_engine() -> dict[str, Any]:
    """Arguments of the plain engine that exactness is measured against."""
    return {
        "model": str(MODEL),
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "seed": 0,
        **GPU_MEMORY,
    }


@pytest.fixture(scope="session")
def ppd_engine(plain_engine: dict[str, Any]) -> dict[str, Any]:
    return {
        **plain_engine,
        "speculative_config": {
            "method": "ppd",
            "model": str(PROMPTS),
            "profile": "none",
        },
        "disable_log_stats": False,
    }
