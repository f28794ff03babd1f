"""What trees accept in vLLM: one engine per source of guesses, plan after plan.

Acceptance length is counted from vLLM's outputs: tokens per decode step and request.
vLLM's own metric divides by the steps that had drafts, and so leaves out those in which
a plan knows no guess worth a row.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.decoding import acceptance_length, decode_counts
from vllm_ppd.cli.engines import EngineProcess, engine_processes, start_all
from vllm_ppd.cli.generation import Batch
from vllm_ppd.files import write_json
from vllm_ppd.trees.menu import TreePlan

__all__ = ["Work", "engine_settings", "measure_plan", "running"]


class Engine(Protocol):
    """What writes; an EngineProcess, or a fake in tests."""

    def hold(self, plan: TreePlan) -> None: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], params: dict[str, Any]
    ) -> Batch: ...


@dataclass(frozen=True)
class Work:
    """What every plan is given to write."""

    model: str
    """Folder or hub id."""
    prompt_tokens: str
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    max_tokens: int
    """Tokens per request."""
    temperatures: Sequence[float]
    batch: int
    """Requests at a time; acceptance does not depend on it."""
    dtype: str = "auto"


def engine_settings(
    work: Work, tree: Path, bigram: bool, ngram: bool
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: the trees of a file, and nothing that changes them."""
    longest = max(len(prompt) for prompt in work.prompts) + work.max_tokens
    return {
        "model": work.model,
        "dtype": work.dtype,
        "seed": 0,
        # No speed is measured, and eager engines start sooner.
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": work.batch,
        "max_model_len": longest + 1,
        "speculative_config": {
            "method": "ppd",
            "model": work.prompt_tokens,
            "tree": str(tree),
            "bigram": bigram,
            "ngram": ngram,
            "profile": "none",
            "online": False,
        },
    }


@contextlib.contextmanager
def running(
    work: Work, widest: TreePlan, bigram: bool, ngram: bool
) -> Iterator[EngineProcess]:
    """An engine for plans of at most as many rows as `widest`, whose trees it has at
    first; its log stays only if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "plan.json"
        write_json(tree, widest.to_dict())
        settings = engine_settings(work, tree, bigram, ngram)
        with engine_processes({"trees": settings}, "trees") as engines:
            start_all(list(engines.values()))
            yield engines["trees"]


def measure_plan(engine: Engine, work: Work, plan: TreePlan) -> dict[str, Any]:
    """Acceptance length by temperature, with its 95 % interval."""
    engine.hold(plan)
    # A step that the end of a text may have cut short is left out.
    reach = 1 + max(tree.depth for tree in plan.trees)
    found: dict[str, Mapping[str, float]] = {}
    for temperature in work.temperatures:
        params = {
            "temperature": temperature,
            "max_tokens": work.max_tokens,
            "ignore_eos": True,
        }
        requests = [
            request
            for at in range(0, len(work.prompts), work.batch)
            for request in engine.generate(
                work.prompts[at : at + work.batch], params
            ).requests
        ]
        counts = [decode_counts(each, work.max_tokens, reach) for each in requests]
        length, width = acceptance_length(counts)
        repeated = [request.repeated for request in requests]
        found[f"{temperature:g}"] = {
            "tokens_per_step": round(length, 4),
            "half_width_95": round(width, 4),
            "steps": sum(steps for _, steps in counts),
            "repeated_4grams": round(sum(repeated) / len(repeated), 4),
        }
    return {"temperatures": found}
