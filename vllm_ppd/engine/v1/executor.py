"""vLLM's multiprocess executor, with two messages a step less.

vLLM asks the worker for its draft tokens in a call of their own, after every step, and
for the sampled tokens in another. Here drafts come with the step's output, and where no
grammar has to be waited for, that output is the answer to `execute_model` itself (see
workers.py). The executor also sees what is scheduled, so this is where rows that are no
draft tokens are reported as such: vLLM's acceptance rate then counts draft tokens.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds

_ATTRIBUTE = "ppd_drafts"


def attach_drafts(output: Any, drafts: DraftTokenIds | None) -> Any:
    """Send the next drafts along with a step's output (in the worker)."""
    if output is not None:
        setattr(output, _ATTRIBUTE, drafts)
    return output


def count_other_rows(drafts: dict[str, list[int]], vocab_size: int) -> dict[str, int]:
    """For each request the scheduled rows that are no draft tokens: not in the
    vocabulary, because they are prompt rows, or padding."""
    words = range(vocab_size)
    return {
        request_id: sum(token not in words for token in tokens)
        for request_id, tokens in drafts.items()
    }


class PPDMultiprocExecutor(MultiprocExecutor):
    # The last answer of the worker, or what will be.
    _output: Any = None

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> Any:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if drafts:
            # vLLM's own field for draft tokens that should not count.
            scheduler_output.num_invalid_spec_tokens = count_other_rows(
                drafts, self.vllm_config.model_config.get_vocab_size()
            )
        self._output = super().execute_model(scheduler_output, non_block)
        return self._output

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        self._output = super().sample_tokens(grammar_output, non_block)
        return self._output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        output, self._output = self._output, None
        if isinstance(output, Future):
            output = output.result()
        return getattr(output, _ATTRIBUTE, None)
