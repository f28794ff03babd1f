"""Measure a machine: whole decode steps of the real model runner, timed.

Runs in the workers when they have started and no request is there yet. Made-up
requests are prefilled and decoded exactly as the scheduler would have it, with trees
of a fixed number of rows; a step of one row is vLLM's own. What is timed is all that
the worker does: layout, forward, verification, KV moves, proposal.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import numpy as np
from tqdm import tqdm
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)

from vllm_ppd.plan import Tier, TreePlan
from vllm_ppd.profile import LatencyProfile
from vllm_ppd.tree import SparseTree, TreePolicy

__all__ = ["measure_profile"]

_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A step with more rows in all is far past where speculation pays.
_MOST_ROWS = 512
_CONTEXT = 128
# A machine's speed drifts and plans are made of ratios, so all row counts of a load are
# visited in turn, several times, and each visit is short. The first step of a visit has
# no guesses yet, the second warms up.
_VISITS, _UNTIMED, _TIMED = 3, 2, 3
# Seconds after which there are no more rounds of visits.
_LONG_ENOUGH = 15.0


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
    limits = runner.scheduler_config
    rows = [count for count in _ROWS if count <= max_rows]
    most = min(_MOST_ROWS, limits.max_num_batched_tokens)
    loads = {
        requests: [n for n in rows if n == 1 or requests * n <= most]
        for requests in _REQUESTS
        if requests <= limits.max_num_seqs
    }
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    cells = sum(map(len, loads.values()))
    begun = time.perf_counter()
    try:
        with tqdm(
            total=_VISITS * cells, desc="PPD measures steps", unit="", disable=quiet
        ) as bar:
            for _ in range(_VISITS):
                for requests, counts in loads.items():
                    visit = _Visit(runner, requests, counts)
                    try:
                        for count in counts:
                            found[requests, count] += visit.seconds(count)
                            bar.update()
                    finally:
                        visit.close()
                if time.perf_counter() - begun > _LONG_ENOUGH:
                    break
            bar.total = bar.n
    finally:
        runner.drafter.set_plan(plan)
        runner.ppd_trees.clear()
    medians = {cell: float(np.median(times)) for cell, times in found.items()}
    table = np.array([_fill_row(medians, load, rows) for load in loads])
    return LatencyProfile.smoothed(list(loads), rows, table, key)


def _fill_row(
    found: dict[tuple[int, int], float], load: int, rows: list[int]
) -> list[float]:
    """Seconds by rows; beyond what was measured, in proportion to the rows."""
    seconds: list[float] = []
    for index, count in enumerate(rows):
        if (load, count) in found:
            seconds.append(found[load, count])
        else:
            seconds.append(seconds[-1] * count / rows[index - 1])
    return seconds


def _tree(rows: int, num_prompt_tokens: int, num_ept: int) -> SparseTree:
    """A tree of `rows` rows: about a third prompt rows, the rest a binary tree."""
    prompt_tokens = min((rows - 1) // (2 + num_ept), 4 * num_prompt_tokens)
    nodes = rows - prompt_tokens * num_ept
    parents = [child // 2 for child in range(nodes - 1)]
    ranks = [child % 2 for child in range(nodes - 1)]
    prompts = [0] * nodes
    for index in range(prompt_tokens):
        prompts[index % nodes] += 1
    return SparseTree(tuple(parents), tuple(ranks), tuple(prompts), num_ept)


class _Visit:
    """So many made-up requests that decode with trees of one size after another.

    Args:
        runner: the model runner.
        requests: how many.
        counts: rows per request that will be asked for.
    """

    def __init__(self, runner: Any, requests: int, counts: list[int]):
        self._runner = runner
        drafter = runner.drafter
        m, e = drafter.prompts.num_prompt_tokens, drafter.prompts.num_ept
        self._trees = {n: _tree(n, m, e) for n in counts if n > 1}
        self._ids = [f"ppd-measure-{index}" for index in range(requests)]
        # Tokens that a visit can write, with room for the rows of its last step.
        steps = _UNTIMED + _TIMED
        most = sum(steps * (1 + self._depth(count)) for count in counts)
        length = runner.model_config.max_model_len
        self._context = max(1, min(_CONTEXT, length - most - max(counts) - 1))
        self._tokens = min(length, self._context + most + max(counts))
        self._computed: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def seconds(self, count: int) -> list[float]:
        """Seconds of each timed step with `count` rows per request.

        Less than usual, but at least one, where the model's length leaves no room.
        """
        runner, drafter = self._runner, self._runner.drafter
        tier = Tier(None)
        if count > 1:
            policy = TreePolicy((self._trees[count],) * drafter.num_states)
            tier = Tier(None, (policy,) * drafter.num_classes)
        drafter.set_plan(TreePlan((tier,)))
        # Guesses pending were laid out for trees that are gone.
        runner.ppd_trees.clear()
        drafts: dict[str, list[int]] = {}
        times: list[float] = []
        for _ in range(_UNTIMED + _TIMED):
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
        return times[_UNTIMED:] or times[-1:]

    def close(self) -> None:
        """Free the requests."""
        if self._computed:
            self._runner.execute_model(_output(finished=set(self._ids)))
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
        at_once = max(1, limit // self._context)
        for first in range(0, len(self._ids), at_once):
            ids = self._ids[first : first + at_once]
            new = [
                NewRequestData(
                    req_id=request_id,
                    prompt_token_ids=rng.integers(
                        2, vocabulary, self._context
                    ).tolist(),
                    mm_features=[],
                    # Sampling costs more than argmax, for plain steps too.
                    sampling_params=SamplingParams(temperature=1.0),
                    pooling_params=None,
                    block_ids=self._blocks(first + index),
                    num_computed_tokens=0,
                    lora_request=None,
                )
                for index, request_id in enumerate(ids)
            ]
            self._execute(_output(new=new, scheduled=dict.fromkeys(ids, self._context)))
            self._runner.take_draft_token_ids()
            self._computed.update(dict.fromkeys(ids, self._context))
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
        scheduled = {i: 1 + len(drafts.get(i, ())) for i in self._ids}
        sampled = self._execute(
            _output(
                cached=cached,
                scheduled=scheduled,
                drafts={i: d for i, d in drafts.items() if d},
            )
        )
        found = self._runner.take_draft_token_ids()
        for request_id, tokens in sampled.items():
            self._computed[request_id] += len(tokens)
            self._written[request_id] += len(tokens)
        if found is None:
            return {}
        return dict(zip(found.req_ids, found.draft_token_ids, strict=True))

    def _execute(self, output: SchedulerOutput) -> dict[str, list[int]]:
        runner = self._runner
        result = runner.execute_model(output)
        if result is None:
            result = runner.sample_tokens(None)
        return dict(zip(result.req_ids, result.sampled_token_ids, strict=True))

    def _blocks(self, index: int) -> tuple[list[int], ...]:
        """Blocks of a request in each KV cache group; block 0 is vLLM's null block."""
        config = self._runner.kv_cache_config
        blocks = []
        for group in config.kv_cache_groups:
            count = -(-self._tokens // group.kv_cache_spec.block_size)
            # With too little cache requests share blocks: what they read is made up
            # anyway, and it takes as long.
            first = index * count
            free = config.num_blocks - 1
            blocks.append([1 + (first + i) % free for i in range(count)])
        return tuple(blocks)


def _output(
    new: list[NewRequestData] | None = None,
    cached: CachedRequestData | None = None,
    scheduled: dict[str, int] | None = None,
    drafts: dict[str, list[int]] | None = None,
    finished: set[str] | None = None,
) -> SchedulerOutput:
    scheduled = scheduled or {}
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = new or []
    if cached is not None:
        output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = scheduled
    output.total_num_scheduled_tokens = sum(scheduled.values())
    output.scheduled_spec_decode_tokens = drafts or {}
    output.finished_req_ids = finished or set()
    return output
