"""Acceptance models for the tests of searches: random, published, measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel

PUBLISHED = Path(__file__).parent / "data" / "published_acceptance.json"
DEMO = Path(__file__).parents[2] / "trained_prompts" / "demo"


def published_model(name: str = "vicuna-7b-v1.3") -> AcceptanceModel:
    """Prompt rows alone, with the published acceptance table of a model."""
    table = np.zeros((3, 10))
    models = json.loads(PUBLISHED.read_text())["models"]
    for row, values in zip(table, models[name], strict=True):
        row[: len(values)] = values
    return AcceptanceModel.of(table)


def random_model(
    seed: int, m: int = 1, ranks: int = 2, classes: int = 1
) -> AcceptanceModel:
    """All sources of draft tokens, with so many match classes besides no match."""
    rng = np.random.default_rng(seed)

    def falling(*shape: int) -> np.ndarray:
        return np.sort(rng.random(shape) / shape[-1], axis=-1)[..., ::-1]

    transitions = rng.random((2, classes + 1, classes + 1)) + 0.1
    return AcceptanceModel(
        prompted=falling(m, ranks),
        unprompted=falling(ranks) / 2,
        ngram=rng.random((classes, 2)) * 0.9,
        beside=falling(classes, m, ranks) / 2,
        transitions=transitions / transitions.sum(axis=2, keepdims=True),
        overall=falling(m + 1, ranks),
        marginal=falling(m, ranks),
    )
