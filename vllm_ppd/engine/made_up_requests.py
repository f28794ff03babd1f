"""Made-up requests: what a model runner decodes before it serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)

# Tokens of a request when it begins to decode, and how many of them are really read.
# The others count as found in the prefix cache: reading takes time that no decode step
# depends on.
CONTEXT, _READ = 128, 4


class MadeUpRequests:
    """Requests of equal length, step by step as vLLM's scheduler would send them.

    Args:
        runner: a model runner of vLLM's, its KV cache allocated.
        num_running: how many.
        rows: of each request in a step, root included.
        max_steps: decode steps that are asked for.
        prompts: of the requests, all read; otherwise they are random.

    Attributes:
        ids: of the requests.
        blocks: of each request, in each KV cache group.
        num_steps: decode steps that they have room for; fewer than were asked for, but
            at least one, where the model's length leaves no room.
    """

    def __init__(
        self,
        runner: Any,
        num_running: int,
        rows: int,
        max_steps: int,
        prompts: Sequence[list[int]] = (),
    ):
        config = runner.vllm_config
        length = config.model_config.max_model_len
        self.ids = [f"ppd-measure-{index}" for index in range(num_running)]
        self.num_steps = max(1, min(max_steps, (length - 2) // rows))
        written = self.num_steps * rows + 1
        rng, vocab_size = np.random.default_rng(0), config.model_config.get_vocab_size()
        context = max(1, min(CONTEXT, length - written))
        drawn = rng.integers(2, vocab_size, (num_running, context)).tolist()
        self._prompts = dict(zip(self.ids, prompts or drawn, strict=True))
        longest = max(map(len, self._prompts.values()))
        self._read = longest if prompts else _READ
        self._max_step_rows = config.scheduler_config.max_num_batched_tokens
        self.blocks = {
            name: blocks_of(runner.kv_cache_config, n, min(length, longest + written))
            for n, name in enumerate(self.ids)
        }
        self._drafts = rows - 1
        self._computed = {name: len(prompt) for name, prompt in self._prompts.items()}
        self._emitted = dict.fromkeys(self.ids, 1)

    def prefill(self) -> Iterator[SchedulerOutput]:
        """Steps in which the requests arrive and read their prompts."""
        at_once = max(1, self._max_step_rows // self._read)
        for first in range(0, len(self.ids), at_once):
            ids = self.ids[first : first + at_once]
            read = {name: min(len(self._prompts[name]), self._read) for name in ids}
            output = self._output(read)
            for request_id in ids:
                prompt = self._prompts[request_id]
                output.scheduled_new_reqs.append(
                    NewRequestData(
                        req_id=request_id,
                        prompt_token_ids=prompt,
                        prefill_token_ids=prompt,
                        mm_features=[],
                        # Sampling costs more than argmax, for plain steps too.
                        sampling_params=SamplingParams(temperature=1.0),
                        pooling_params=None,
                        block_ids=self.blocks[request_id],
                        num_computed_tokens=len(prompt) - read[request_id],
                        lora_request=None,
                    )
                )
            yield output

    def decode(self, drafts: Mapping[str, list[int]]) -> SchedulerOutput:
        """A step of all requests, with these draft rows of each."""
        drafts = {request_id: ids for request_id, ids in drafts.items() if ids}
        output = self._output(
            {request_id: 1 + len(drafts.get(request_id, ())) for request_id in self.ids}
        )
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=self.ids,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(self.ids),
            num_computed_tokens=list(self._computed.values()),
            num_output_tokens=list(self._emitted.values()),
        )
        output.scheduled_spec_decode_tokens = drafts
        return output

    def advance(self, request_id: str, num_tokens: int) -> None:
        """Note what a request emitted, or at most has emitted."""
        self._computed[request_id] += num_tokens
        self._emitted[request_id] += num_tokens

    def finish(self) -> SchedulerOutput:
        """A step without rows in which all requests are freed."""
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = set(self.ids)
        return output

    def _output(self, tokens: dict[str, int]) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs = []
        output.num_scheduled_tokens = tokens
        output.total_num_scheduled_tokens = sum(tokens.values())
        output.num_spec_tokens_to_schedule = self._drafts
        return output


def blocks_of(config: Any, index: int, num_tokens: int) -> tuple[list[int], ...]:
    """Blocks of a made-up request in each KV cache group; 0 is vLLM's null block.

    Args:
        config: vLLM's KVCacheConfig.
        index: of the request.
        num_tokens: most that it will have.
    """
    sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
    counts = [-(-num_tokens // size) for size in sizes]
    # Groups share memory: no two have a block in common. With too little cache requests
    # do: what they read is made up anyway, and it takes as long.
    first, free, blocks = index * sum(counts), config.num_blocks - 1, []
    for count in counts:
        blocks.append([1 + (first + i) % free for i in range(count)])
        first += count
    return tuple(blocks)
