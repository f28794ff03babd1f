"""Made-up requests on the V2 model runner, decoded and timed: see engine/measure.py.

Here the host runs ahead of the device, as it does when it serves, so a few steps are
timed together, from when the device is idle until it is again.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData

from vllm_ppd.engine.measure import CONTEXT, blocks_of, scheduled

__all__ = ["MeasuredSteps"]

# Steps before the clock starts (the first has no drafts), and timed ones.
_UNTIMED, _TIMED = 2, 8


class MeasuredSteps:
    """A V2 model runner as `measured_profile` sees it.

    Args:
        runner: with PPD, its KV cache allocated.
    """

    def __init__(self, runner: Any):
        self._runner = runner
        self.max_num_running = runner.max_num_reqs
        self.max_step_rows = runner.max_num_tokens
        # A request has a token besides, and vLLM's context is not exceeded.
        longest = max(1, runner.max_model_len - 2)
        bounds = [1, *runner.speculator.requests.row_bounds]
        self.row_counts = [count for count in bounds if count <= longest]

    def visit(self, num_running: int, rows: list[int]) -> _Visit:
        return _Visit(self._runner, num_running)

    def finish(self) -> None:
        """Nothing to undo: the menu's own trees were measured."""


class _Visit:
    """So many made-up requests, new ones for each number of rows.

    Args:
        runner: the model runner.
        num_running: how many.
    """

    def __init__(self, runner: Any, num_running: int):
        self._runner = runner
        self._ids = [f"ppd-measure-{index}" for index in range(num_running)]
        self._running = False
        # Tokens that each request may have by now: how many were accepted is on the
        # device, and the host goes by the most that can be.
        self._computed = 0

    def seconds(self, rows: int) -> list[float]:
        """Seconds of a step with `rows` rows per request, the mean of some steps."""
        length = self._runner.max_model_len
        steps = max(1, min(_UNTIMED + _TIMED, (length - 2) // rows))
        untimed = min(_UNTIMED, steps - 1)
        longest = min(CONTEXT, self._runner.max_num_tokens)
        context = max(1, min(longest, length - steps * rows - 1))
        self._prefill(context, rows, context + steps * rows + 1)
        for _ in range(untimed):
            self._step(rows)
        torch.accelerator.synchronize()
        began = time.perf_counter()
        for _ in range(steps - untimed):
            self._step(rows)
        torch.accelerator.synchronize()
        elapsed = time.perf_counter() - began
        self.close()
        return [elapsed / (steps - untimed)]

    def close(self) -> None:
        """Free the requests."""
        if self._running:
            self._runner.execute_model(scheduled(finished=set(self._ids)))
            self._running = False

    def _prefill(self, context: int, rows: int, tokens: int) -> None:
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
            self._execute(new=new, tokens=dict.fromkeys(ids, context), rows=rows)
        self._computed = context

    def _step(self, rows: int) -> None:
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
        drafts = {i: [-1] * (rows - 1) for i in ids} if rows > 1 else {}
        tokens = dict.fromkeys(ids, rows)
        self._execute(cached=cached, tokens=tokens, drafts=drafts, rows=rows)
        self._computed += rows

    def _execute(self, rows: int, **parts: Any) -> None:
        self._runner.execute_model(scheduled(**parts, next_drafts=rows - 1))
        self._runner.sample_tokens(None)
