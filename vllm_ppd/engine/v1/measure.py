"""Measure a machine: whole decode steps of the real model runner, timed.

Runs in the workers when they have started and no request is there yet. Made-up
requests are prefilled and decoded exactly as the scheduler would have it, with trees
of a fixed number of rows; a step of one row is vLLM's own. What is timed is all that
the worker does: layout, forward, verification, KV moves, proposal.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)

from vllm_ppd.engine.made_up_requests import blocks_of, scheduled, tree_of_rows
from vllm_ppd.engine.measure import CONTEXT, ROWS, TIMED, UNTIMED, measure_grid
from vllm_ppd.engine.v1.measure_context import measure_context_cost
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy

__all__ = ["measure_profile"]


def measure_profile(
    runner: Any, max_rows: int, key: dict[str, Any], quiet: bool = False
) -> LatencyProfile:
    """The profile of the engine that `runner` belongs to.

    Args:
        runner: a V1 model runner with PPD, its KV cache allocated.
        max_rows: most rows per request.
        key: of `known_profile.profile_key`.
        quiet: no progress bar.
    """
    plan = runner.drafter.plan
    rows = [count for count in ROWS if count <= max_rows]
    limits = runner.scheduler_config
    try:
        profile = measure_grid(
            lambda requests, counts: _Visit(runner, requests, counts, CONTEXT),
            rows,
            limits,
            key,
            quiet,
            bare=_Visit.bare_seconds,
        )
        cost = measure_context_cost(
            lambda *asked: _Visit(runner, *asked), rows, limits.max_num_seqs
        )
        return replace(profile, context_cost=cost)
    finally:
        runner.drafter.set_plan(plan)
        runner.ppd_trees.clear()


class _Visit:
    """So many made-up requests that decode with trees of one size after another.

    Args:
        runner: the model runner.
        requests: how many.
        counts: rows per request that will be asked for.
        context: tokens of each when it begins.

    Attributes:
        context: the same; fewer where the model's length leaves no room.
    """

    def __init__(self, runner: Any, requests: int, counts: list[int], context: int):
        self._runner = runner
        drafter = runner.drafter
        m, e = drafter.prompts.num_prompt_tokens, drafter.prompts.num_ept
        self._trees = {n: tree_of_rows(n, m, e) for n in counts if n > 1}
        self._ids = [f"ppd-measure-{index}" for index in range(requests)]
        # Tokens that a visit can write, with room for the rows of its last step.
        steps = UNTIMED + TIMED
        most = sum(steps * (1 + self._depth(count)) for count in [1, *counts])
        length = runner.model_config.max_model_len
        self.context = max(1, min(context, length - most - max(counts) - 1))
        self._tokens = min(length, self.context + most + max(counts))
        # Of the prompt only so many tokens are read; others are as if they were found
        # in the prefix cache.
        batched = runner.scheduler_config.max_num_batched_tokens
        self._read = min(self.context, CONTEXT, batched)
        self._computed: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def seconds(self, count: int) -> list[float]:
        """Seconds of each timed step with `count` rows per request.

        Less than usual, but at least one, where the model's length leaves no room.
        """
        return self._seconds(count, self._trees.get(count))

    def bare_seconds(self) -> list[float]:
        """Those of steps in which nobody guesses, though guesses may come."""
        prompts = self._runner.drafter.prompts
        return self._seconds(1, SparseTree((), (), (0,), prompts.num_ept))

    def _seconds(self, count: int, tree: SparseTree | None) -> list[float]:
        """Seconds of each timed step with a tree of `count` rows, or a plain one."""
        runner, drafter = self._runner, self._runner.drafter
        tier = Tier(None)
        if tree is not None:
            policy = TreePolicy((tree,) * drafter.num_states)
            tier = Tier(None, (policy,) * drafter.num_classes)
        drafter.set_plan(TreePlan((tier,)))
        # DraftInputs pending were laid out for trees that are gone.
        runner.ppd_trees.clear()
        drafts: dict[str, list[int]] = {}
        times: list[float] = []
        for _ in range(UNTIMED + TIMED):
            if not self._has_room(count):
                if times:
                    break
                self.close()
                drafts = {}
            if not self._computed:
                self._prefill()
            begun = time.perf_counter()
            drafts = self._step(drafts)
            times.append(time.perf_counter() - begun)
        return times[UNTIMED:] or times[-1:]

    def close(self) -> None:
        """Free the requests."""
        if self._computed:
            self._runner.execute_model(scheduled(finished=set(self._ids)))
        self._computed, self._written = {}, {}

    def _depth(self, count: int) -> int:
        return self._trees[count].depth if count > 1 else 0

    def _has_room(self, count: int) -> bool:
        longest = max(self._computed.values(), default=0)
        return longest + count + 1 <= self._tokens

    def _prefill(self) -> None:
        runner = self._runner
        rng = np.random.default_rng(0)
        vocabulary = runner.model_config.get_vocab_size()
        limit = runner.scheduler_config.max_num_batched_tokens
        at_once = max(1, limit // self._read)
        for first in range(0, len(self._ids), at_once):
            ids = self._ids[first : first + at_once]
            new = [
                NewRequestData(
                    req_id=request_id,
                    prompt_token_ids=rng.integers(2, vocabulary, self.context).tolist(),
                    mm_features=[],
                    # Sampling costs more than argmax, for plain steps too.
                    sampling_params=SamplingParams(temperature=1.0),
                    pooling_params=None,
                    block_ids=blocks_of(
                        runner.kv_cache_config, first + index, self._tokens
                    ),
                    num_computed_tokens=self.context - self._read,
                    lora_request=None,
                )
                for index, request_id in enumerate(ids)
            ]
            self._execute(scheduled(new=new, tokens=dict.fromkeys(ids, self._read)))
            self._runner.take_draft_token_ids()
            self._computed.update(dict.fromkeys(ids, self.context))
            self._written.update(dict.fromkeys(ids, 1))

    def _step(self, drafts: dict[str, list[int]]) -> dict[str, list[int]]:
        """One whole decode step; the guesses for the next one."""
        cached = CachedRequestData(
            req_ids=self._ids,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(self._ids),
            num_computed_tokens=[self._computed[i] for i in self._ids],
            num_output_tokens=[self._written[i] for i in self._ids],
        )
        tokens = {i: 1 + len(drafts.get(i, ())) for i in self._ids}
        sampled = self._execute(
            scheduled(
                cached=cached,
                tokens=tokens,
                drafts={i: d for i, d in drafts.items() if d},
            )
        )
        found = self._runner.take_draft_token_ids()
        for request_id, emitted in sampled.items():
            self._computed[request_id] += len(emitted)
            self._written[request_id] += len(emitted)
        if found is None:
            return {}
        return dict(zip(found.req_ids, found.draft_token_ids, strict=True))

    def _execute(self, output: SchedulerOutput) -> dict[str, list[int]]:
        runner = self._runner
        result = runner.execute_model(output)
        if result is None:
            result = runner.sample_tokens(None)
        return dict(zip(result.req_ids, result.sampled_token_ids, strict=True))
