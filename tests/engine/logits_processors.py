"""Custom logits processors for both runners: one for all requests, one for some."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

# The output token that `Jump` sets.
PLACE = 9


class NoRepeat(LogitsProcessor):
    """Bans each request's last token."""

    def __init__(self, *_: Any):
        self.outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.outputs, batch_update, lambda _, __, output: output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, output in self.outputs.items():
            if output:
                logits[row, output[-1]] = -torch.inf
        return logits


class Jump(AdapterLogitsProcessor):
    """Sets one token of the requests that ask for it."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        jump = params.extra_args["jump"]  # all requests have it

        def processor(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) == PLACE:
                logits[jump] = 1e4
            return logits

        return processor if jump else None


class NoRepeatV2(ProcessorV2):
    """Bans each row's own token, which comes last before the one that is sampled."""

    def __init__(self, _: Any, states: Any):
        self.states = states

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        ids, slots = ctx.input_ids.long(), ctx.expanded_idx_mapping.long()
        is_output = ctx.pos >= self.states.prompt_len.gpu[slots]
        rows = torch.arange(len(ids), device=ids.device)[is_output]
        logits[rows, ids[is_output]] = -torch.inf
        return logits


class JumpV2(ProcessorV2):
    """Sets one token of the requests that ask for it."""

    def __init__(self, _: Any, states: Any):
        self.states = states
        self.jumps = torch.zeros(states.max_num_reqs, dtype=torch.long)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        # vLLM's own warm-up has none.
        self.jumps[req_idx] = (sampling_params.extra_args or {"jump": 0})["jump"]
        return bool(self.jumps[req_idx])

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots = ctx.expanded_idx_mapping.long()
        jumps = self.jumps.to(logits.device)[slots]
        place = ctx.pos + 1 - self.states.prompt_len.gpu[slots]
        rows = torch.nonzero((place == PLACE) & (jumps > 0))[:, 0]
        logits[rows, jumps[rows]] = 1e4
        return logits
