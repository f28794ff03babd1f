"""Measure a machine on V2: whole decode steps of the real model runner, timed.

As on V1 made-up requests are prefilled and decoded. Here the host runs ahead of the
device, as it does when it serves, so a few steps are timed together, from when the
device is idle until it is again.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData

from vllm_ppd.engine.made_up_requests import blocks_of, scheduled, tree_of_rows
from vllm_ppd.engine.measure import CONTEXT, measure_grid
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import Tier, TreePlan
from vllm_ppd.trees.tree import TreePolicy

__all__ = ["measure_profile", "rows_to_measure"]

# Steps before the clock starts (the first has no guesses), and timed ones.
_UNTIMED, _TIMED = 2, 8


def rows_to_measure(row_bounds: list[int]) -> list[int]:
    """Rows per request: powers of two, and what the engine schedules itself.

    row_bounds: of the engine's trees.
    """
    most = row_bounds[-1]
    powers = {1 << bit for bit in range(most.bit_length())}
    return sorted({n for n in powers if n <= most} | set(row_bounds))


def measure_profile(runner: Any, key: dict[str, Any], quiet: bool) -> LatencyProfile:
    """The profile of the engine that `runner` belongs to.

    Args:
        runner: a V2 model runner with PPD that is ready to serve.
        key: of `known_profile.profile_key`.
        quiet: no progress bar.
    """
    trees = runner.speculator.trees
    served, bounds = trees.served_plan, trees.row_bounds
    # A request has a token besides, and vLLM's context is not exceeded.
    longest = max(1, runner.max_model_len - 2)
    rows = [count for count in rows_to_measure(bounds) if count <= longest]
    # The attention kernel is made for these too.
    trees.row_bounds = sorted({*rows, *bounds})
    try:
        return measure_grid(
            lambda requests, counts: _Visit(runner, requests),
            rows,
            runner.scheduler_config,
            key,
            quiet,
        )
    finally:
        trees.row_bounds = bounds
        trees.set_plan(served)


class _Visit:
    """So many made-up requests, new ones for each number of rows.

    Args:
        runner: the model runner.
        requests: how many.
    """

    def __init__(self, runner: Any, requests: int):
        self._runner = runner
        self._trees = runner.speculator.trees
        self._served = self._trees.served_plan
        self._ids = [f"ppd-measure-{index}" for index in range(requests)]
        self._running = False
        # Tokens that each request may have by now: how many were accepted is on the
        # device, and the host goes by the most that can be.
        self._computed = 0

    def seconds(self, count: int) -> list[float]:
        """Seconds of a step with `count` rows per request, the mean of some steps."""
        self._trees.set_plan(self._plan(count))
        length = self._runner.max_model_len
        steps = max(1, min(_UNTIMED + _TIMED, (length - 2) // count))
        untimed = min(_UNTIMED, steps - 1)
        longest = min(CONTEXT, self._runner.max_num_tokens)
        context = max(1, min(longest, length - steps * count - 1))
        self._prefill(context, count, context + steps * count + 1)
        for _ in range(untimed):
            self._step(count)
        torch.accelerator.synchronize()
        begun = time.perf_counter()
        for _ in range(steps - untimed):
            self._step(count)
        torch.accelerator.synchronize()
        elapsed = time.perf_counter() - begun
        self.close()
        return [elapsed / (steps - untimed)]

    def close(self) -> None:
        """Free the requests."""
        if self._running:
            self._runner.execute_model(scheduled(finished=set(self._ids)))
            self._running = False

    def _plan(self, count: int) -> TreePlan:
        """One tree of so many rows for everyone, guessed for as when serving."""
        plan = self._served
        if count == 1:
            return TreePlan((Tier(None),))
        m = plan.num_prompt_tokens
        policy = TreePolicy((tree_of_rows(count, m, plan.num_ept),) * (m + 1))
        return TreePlan((Tier(None, (policy,) * plan.num_classes),))

    def _prefill(self, context: int, count: int, tokens: int) -> None:
        """Give each request `context` tokens, and room for `tokens`."""
        runner = self._runner
        rng = np.random.default_rng(0)
        vocabulary = runner.model_config.get_vocab_size()
        at_once = max(1, runner.max_num_tokens // context)
        for first in range(0, len(self._ids), at_once):
            ids = self._ids[first : first + at_once]
            new = []
            for index, request_id in enumerate(ids, first):
                prompt = rng.integers(2, vocabulary, context).tolist()
                new.append(
                    NewRequestData(
                        req_id=request_id,
                        prompt_token_ids=prompt,
                        prefill_token_ids=prompt,
                        mm_features=[],
                        # Sampling costs more than argmax, for plain steps too.
                        sampling_params=SamplingParams(temperature=1.0),
                        pooling_params=None,
                        block_ids=blocks_of(runner.kv_cache_config, index, tokens),
                        num_computed_tokens=0,
                        lora_request=None,
                    )
                )
            self._running = True
            self._execute(scheduled(new=new, tokens=dict.fromkeys(ids, context)), count)
        self._computed = context

    def _step(self, count: int) -> None:
        """One whole decode step."""
        ids = self._ids
        cached = CachedRequestData(
            req_ids=ids,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(ids),
            num_computed_tokens=[self._computed] * len(ids),
            num_output_tokens=[1] * len(ids),
        )
        drafts = {i: [-1] * (count - 1) for i in ids} if count > 1 else {}
        tokens = dict.fromkeys(ids, count)
        self._execute(scheduled(cached=cached, tokens=tokens, drafts=drafts), count)
        self._computed += count

    def _execute(self, output: Any, count: int) -> None:
        output.num_spec_tokens_to_schedule = count - 1
        self._runner.execute_model(output)
        self._runner.sample_tokens(None)
