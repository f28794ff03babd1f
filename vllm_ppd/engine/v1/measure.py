"""Made-up requests on the V1 model runner, decoded and timed: see engine/measure.py."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)

from vllm_ppd.engine.measure import (
    CONTEXT,
    TIMED,
    UNTIMED,
    blocks_of,
    scheduled,
    tree_of_rows,
)
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import TreePolicy

__all__ = ["MeasuredSteps"]

# Tokens of a prompt that are really read; the others count as found in the prefix
# cache. Reading takes time that no decode step depends on.
_READ = 4


class MeasuredSteps:
    """A V1 model runner as `measured_profile` sees it.

    Args:
        runner: with PPD, its KV cache allocated.
    """

    row_counts: list[int] | None = None

    def __init__(self, runner: Any):
        self._runner = runner
        self._menu = runner.drafter.menu
        limits = runner.scheduler_config
        self.max_num_running = limits.max_num_seqs
        self.max_step_rows = limits.max_num_batched_tokens

    def visit(self, num_running: int, rows: list[int]) -> _Visit:
        return _Visit(self._runner, num_running, rows)

    def finish(self) -> None:
        self._runner.drafter.set_menu(self._menu)
        self._runner.ppd_trees.clear()


class _Visit:
    """Requests that decode with trees of one size after another.

    Args:
        runner: the model runner.
        num_running: how many.
        rows: per request, all that will be asked for.
    """

    def __init__(self, runner: Any, num_running: int, rows: list[int]):
        self._runner = runner
        prompts = runner.drafter.prompts
        m, e = prompts.num_prompt_tokens, prompts.num_ept
        self._trees = {n: tree_of_rows(n, m, e) for n in rows if n > 1}
        self._ids = [f"ppd-measure-{index}" for index in range(num_running)]
        # Tokens that a visit can write, with room for the rows of its last step.
        steps = UNTIMED + TIMED
        written = sum(steps * (1 + self._depth(count)) for count in rows)
        length = runner.model_config.max_model_len
        self._context = max(1, min(CONTEXT, length - written - max(rows) - 1))
        self._tokens = min(length, self._context + written + max(rows))
        self._read = min(self._context, _READ)
        self._computed: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def seconds(self, rows: int) -> list[float]:
        """Seconds of each timed step with `rows` rows per request.

        Fewer than usual, but at least one, where the model's length leaves no room.
        """
        runner, drafter = self._runner, self._runner.drafter
        if rows > 1:
            policy = TreePolicy(
                (self._trees[rows],) * (drafter.menu.num_prompt_tokens + 1)
            )
            entry = MenuEntry((policy,) * drafter.menu.num_classes)
            drafter.set_menu(TreeMenu((entry,)))
        # Pending drafts were laid out for trees that are gone.
        runner.ppd_trees.clear()
        drafts: dict[str, list[int]] = {}
        times: list[float] = []
        for _ in range(UNTIMED + TIMED):
            if not self._has_room(rows):
                if times:
                    break
                self.close()
                drafts = {}
            if not self._computed:
                self._prefill()
            began = time.perf_counter()
            drafts = self._step(drafts, rows - 1)
            times.append(time.perf_counter() - began)
        return times[UNTIMED:] or times[-1:]

    def close(self) -> None:
        """Free the requests."""
        if self._computed:
            self._runner.execute_model(scheduled(finished=set(self._ids)))
        self._computed, self._written = {}, {}

    def _depth(self, rows: int) -> int:
        return self._trees[rows].depth if rows > 1 else 0

    def _has_room(self, rows: int) -> bool:
        longest = max(self._computed.values(), default=0)
        return longest + rows + 1 <= self._tokens

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
                    prompt_token_ids=rng.integers(
                        2, vocabulary, self._context
                    ).tolist(),
                    mm_features=[],
                    # Sampling costs more than argmax, for plain steps too.
                    sampling_params=SamplingParams(temperature=1.0),
                    pooling_params=None,
                    block_ids=blocks_of(
                        runner.kv_cache_config, first + index, self._tokens
                    ),
                    num_computed_tokens=self._context - self._read,
                    lora_request=None,
                )
                for index, request_id in enumerate(ids)
            ]
            self._execute(scheduled(new=new, tokens=dict.fromkeys(ids, self._read)))
            self._runner.take_draft_token_ids()
            self._computed.update(dict.fromkeys(ids, self._context))
            self._written.update(dict.fromkeys(ids, 1))

    def _step(
        self, drafts: dict[str, list[int]], next_drafts: int
    ) -> dict[str, list[int]]:
        """One whole decode step; the drafts for the next one."""
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
                next_drafts=next_drafts,
            )
        )
        proposed = self._runner.take_draft_token_ids()
        for request_id, emitted in sampled.items():
            self._computed[request_id] += len(emitted)
            self._written[request_id] += len(emitted)
        if proposed is None:
            return {}
        return dict(zip(proposed.req_ids, proposed.draft_token_ids, strict=True))

    def _execute(self, output: SchedulerOutput) -> dict[str, list[int]]:
        runner = self._runner
        result = runner.execute_model(output)
        if result is None:
            result = runner.sample_tokens(None)
        return dict(zip(result.req_ids, result.sampled_token_ids, strict=True))
