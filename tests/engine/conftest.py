"""Engines and models that the engine tests share."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.engine.engine_process import GPU_MEMORY, ON_GPU, ROOT, EngineProcess
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, save_menus
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

MODEL = ROOT / "demo_model" / "model"
PROMPTS = ROOT / "trained_prompts" / "demo"
# Arguments of the plain engine that exactness is measured against, and PPD's settings.
DEMO = {
    "model": str(MODEL),
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "seed": 0,
    "disable_log_stats": False,
    **GPU_MEMORY,
}
DEMO_PPD = {"method": "ppd", "model": str(PROMPTS), "profile": "none"}
GREEDY = {"temperature": 0.0, "ignore_eos": True}
COMPARED = {"tokens": 0}
# Tests that look into the V1 runner, or need several devices or none.
cpu_only = pytest.mark.skipif(ON_GPU, reason="about engines on a CPU")


def mixed(texts: list[str], count: int, first: int = 0) -> list[str]:
    """Prompts from a few to some hundred tokens."""
    lengths = [40, 700, 150, 1000, 300, 90, 500, 20]
    numbers = range(first, first + count)
    return [texts[n % len(texts)][: lengths[(n - first) % 8]] for n in numbers]


def same(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> None:
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        for key in ("ids", "finish", "stop", "text"):
            assert b[key] == a[key], f"request {index} differs in {key}"
        COMPARED["tokens"] += sum(len(ids) for ids in a["ids"])


def engine_with(engine: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """An engine with more of PPD's settings."""
    speculative = {**engine["speculative_config"], **settings}
    return {**engine, "speculative_config": speculative}


def menu_file(path: Path, *entries: tuple[TreePolicy, ...]) -> str:
    menu = TreeMenu(tuple(MenuEntry(policies) for policies in entries))
    save_menus(path, menu, menu)
    return str(path)


@contextlib.contextmanager
def started(folders: pytest.TempPathFactory) -> Iterator[Any]:
    """Called with a class of engine processes and its arguments: starts one, which
    ends with the block."""
    with contextlib.ExitStack() as stack:
        yield lambda kind=EngineProcess, **how: stack.enter_context(
            contextlib.closing(kind(folders.mktemp("engine"), **how))
        )


@pytest.fixture(scope="session")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with started(tmp_path_factory) as start:
        yield start


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with started(tmp_path_factory) as start:
        yield start


@pytest.fixture(params=["mp", "ray"])
def two_ranks(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Arguments of an engine of two ranks, which vLLM or Ray starts."""
    ray = request.param == "ray"
    if ray and find_spec("ray") is None:
        pytest.skip("ray is not installed (pip install ray)")
    # No other test's Ray beside this one: they would find each other.
    lock = FileLock(Path(tempfile.gettempdir()) / "vllm_ppd_tests_ray.lock")
    with lock if ray else contextlib.nullcontext():
        executor = {"distributed_executor_backend": request.param}
        yield {"tensor_parallel_size": 2, **executor}


@pytest.fixture(scope="session")
def plain(start_once: Any) -> EngineProcess:
    return start_once()


@pytest.fixture(scope="session")
def ppd(start_once: Any) -> EngineProcess:
    return start_once()


@pytest.fixture(scope="session")
def plain_engine() -> dict[str, Any]:
    return DEMO


@pytest.fixture(scope="session")
def ppd_engine() -> dict[str, Any]:
    return {**DEMO, "speculative_config": DEMO_PPD}


@pytest.fixture
def check(plain: Any, ppd: Any, plain_engine: Any, ppd_engine: Any) -> Any:
    """Called with requests, parameters, perhaps PPD's settings, and arguments of both
    engines: decodes plainly and with PPD, compares, and returns both outputs and how
    many draft tokens were accepted."""

    def decode(requests: Any, params: Any, ppd_settings: Any = (), **more: Any) -> Any:
        engine = engine_with({**ppd_engine, **more}, **dict(ppd_settings))
        expected = plain.generate({**plain_engine, **more}, requests, params)
        before = ppd.accepted(engine)
        actual = ppd.generate(engine, requests, params)
        same(expected, actual)
        return expected, actual, ppd.accepted(engine) - before

    return decode


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
    chains = [chain_tree(n, (3,) * (n + 1)) for n in range(4)]
    policies = {
        "prompt_rows_only": TreePolicy((chains[0],) * 4),
        "chain": TreePolicy(tuple(chains)),
        "wide": TreePolicy((chains[0], wide1, wide2, wide)),
    }
    folder = tmp_path_factory.mktemp("trees")
    return {
        name: menu_file(folder / f"{name}.json", (policy,))
        for name, policy in policies.items()
    }


@pytest.fixture(scope="session")
def noise_prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompt tokens that predict nothing: random noise."""
    trained = PromptTokens.load(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(trained.embeddings.shape, generator=generator)
    folder = tmp_path_factory.mktemp("noise") / "prompts"
    PromptTokens(noise, trained.base).save(folder)
    return str(folder)
