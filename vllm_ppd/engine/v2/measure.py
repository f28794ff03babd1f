"""Decode steps of made-up requests on the V2 model runner, timed a few together.

The host runs ahead of the device, as it does while it serves, so steps are timed from
when the device is idle until it is again.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from vllm_ppd.engine.made_up_requests import MadeUpRequests
from vllm_ppd.engine.measure import MeasuredRunner, is_slow

_UNTIMED, _TIMED = 2, 8


class MeasuredSteps(MeasuredRunner):
    """Steps on V2, as a mean of some; only with the rows of the menu's entries, for
    which there are CUDA graphs."""

    def __init__(self, runner: Any):
        super().__init__(runner)
        # A request has a token besides, and vLLM's context is not exceeded.
        longest = runner.vllm_config.model_config.max_model_len - 2
        rows = [entry.max_rows for entry in runner.ppd_menu.entries]
        self.row_counts = [1, *(count for count in rows if count <= longest)]

    def seconds(self, num_running: int, rows: int) -> list[float]:
        runner = self._runner
        requests = MadeUpRequests(runner, num_running, rows, _UNTIMED + _TIMED)
        for output in requests.prefill():
            self._execute(output)
        seconds = self._timed(requests, rows, 1)
        timed = requests.num_steps - _UNTIMED
        if timed > 0 and not is_slow(seconds):
            self._timed(requests, rows, _UNTIMED - 1)
            seconds = self._timed(requests, rows, timed) / timed
        runner.execute_model(requests.finish())
        return [seconds]

    def _timed(self, requests: MadeUpRequests, rows: int, steps: int) -> float:
        """Run so many decode steps; the seconds of them all."""
        # The drafts are on the device. So is what was accepted: the host goes by the
        # most that can have been.
        drafts = dict.fromkeys(requests.ids, [-1] * (rows - 1))
        torch.accelerator.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self._execute(requests.decode(drafts))
            for request_id in requests.ids:
                requests.advance(request_id, rows)
        torch.accelerator.synchronize()
        return time.perf_counter() - began

    def _execute(self, output: Any) -> None:
        self._runner.execute_model(output)
        self._runner.sample_tokens(None)
