"""Decode steps of made-up requests on the V1 model runner, timed one by one."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_ppd.engine.made_up_requests import MadeUpRequests
from vllm_ppd.engine.measure import MeasuredRunner, is_slow
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import SparseTree, TreePolicy

# The first step warms up.
_UNTIMED, _TIMED = 1, 3


class MeasuredSteps(MeasuredRunner):
    """Steps on V1, one by one; trees of any size run."""

    def __init__(self, runner: Any):
        super().__init__(runner)
        self._menu = runner.drafter.menu

    def seconds(self, num_running: int, rows: int) -> list[float]:
        steps = _UNTIMED + _TIMED
        requests = MadeUpRequests(self._runner, num_running, rows, steps)
        self._serve(rows)
        drafts: dict[str, list[int]] = {}
        for output in requests.prefill():
            drafts |= self._execute(output)[1]
        times: list[float] = []
        for _ in range(requests.num_steps):
            output = requests.decode(drafts)
            began = time.perf_counter()
            emitted, drafts = self._execute(output)
            times.append(time.perf_counter() - began)
            for request_id, tokens in emitted.items():
                requests.advance(request_id, len(tokens))
            if is_slow(times[-1]):
                break
        self._runner.execute_model(requests.finish())
        return times[_UNTIMED:] or times

    def finish(self) -> None:
        self._runner.drafter.set_menu(self._menu)
        self._runner.ppd_trees.clear()

    def _serve(self, rows: int) -> None:
        menu = self._menu
        if rows > 1:
            tree = tree_of_rows(rows, menu.num_prompt_tokens, menu.num_ept)
            policy = TreePolicy((tree,) * (menu.num_prompt_tokens + 1))
            entry = MenuEntry((policy,) * menu.num_classes)
            self._runner.drafter.set_menu(TreeMenu((entry,)))

    def _execute(
        self, output: SchedulerOutput
    ) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Run one step; each request's emitted tokens, and its drafts for the next."""
        runner = self._runner
        result = runner.execute_model(output)
        if result is None:
            result = runner.sample_tokens(None)
        emitted = dict(zip(result.req_ids, result.sampled_token_ids, strict=True))
        drafts = runner.take_draft_token_ids()
        if drafts is None:
            return emitted, {}
        return emitted, dict(zip(drafts.req_ids, drafts.draft_token_ids, strict=True))


def tree_of_rows(rows: int, num_prompt_tokens: int, num_ept: int) -> SparseTree:
    """A tree of `rows` rows: about a third prompt rows, the rest a binary tree."""
    prompt_tokens = min((rows - 1) // (2 + num_ept), 4 * num_prompt_tokens)
    nodes = rows - prompt_tokens * num_ept
    parents = [child // 2 for child in range(nodes - 1)]
    ranks = [child % 2 for child in range(nodes - 1)]
    prompts = [0] * nodes
    for index in range(prompt_tokens):
        prompts[index % nodes] += 1
    return SparseTree(tuple(parents), tuple(ranks), tuple(prompts), num_ept)
