"""The frozen model's own continuations of prompts, with its cache left for reuse.

Written out here rather than left to `generate`, which would bring in the model's own
sampling defaults (top-p, penalties) and draw from the global random numbers, and whose
cache could not be handed to the prompt rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from vllm_ppd.train.model import FrozenModel, OrdinaryRows


@dataclass(frozen=True, eq=False)
class Continuation:
    """Prompts of equal length with what the model wrote after them."""

    tokens: torch.Tensor
    """int64 [batch, T + 1]."""
    written: torch.Tensor
    """bool [batch, T + 1]: True at tokens that the model wrote, up to and including
    its first end-of-text token."""
    ordinary: OrdinaryRows
    """Rows of the first T tokens; the last one was never fed."""


@torch.no_grad()
def continue_prompts(
    model: FrozenModel,
    prompts: torch.Tensor,
    count: int,
    temperature: float,
    generator: torch.Generator,
) -> Continuation:
    """Up to `count` further tokens of each prompt in `prompts`, int64 [batch, L].

    Greedy at temperature 0, else sampled from the whole distribution, with one number
    of the CPU `generator` per token and prompt. Stops early once all have ended.
    """
    ends = torch.tensor(end_tokens(model), dtype=torch.long, device=model.device)
    cache = DynamicCache()
    prompts = prompts.to(model.device)
    columns, hidden, row = [prompts], [], prompts
    alive = torch.ones_like(prompts[:, :1]).bool()
    written = [torch.zeros_like(prompts).bool()]
    for _ in range(count):
        output = model.model.base_model(
            input_ids=row, past_key_values=cache, use_cache=True
        )
        hidden.append(output.last_hidden_state)
        logits = model.logits(output.last_hidden_state[:, -1])
        row = _pick(logits, temperature, generator)[:, None]
        columns.append(row)
        written.append(alive)
        alive = alive & ~torch.isin(row, ends)
        if not bool(alive.any()):
            break
    return Continuation(
        tokens=torch.cat(columns, dim=1),
        written=torch.cat(written, dim=1),
        ordinary=OrdinaryRows(torch.cat(hidden, dim=1), cache),
    )


def end_tokens(model: FrozenModel) -> list[int]:
    """Tokens after which the model has nothing more to say, as serving has it."""
    generation = getattr(model.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = getattr(model.config, "eos_token_id", None)
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _pick(
    logits: torch.Tensor, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """int64 [batch]: a token from float32 logits [batch, vocabulary]."""
    if temperature == 0:
        return logits.argmax(dim=1)
    # By inversion: the device sees the same random numbers whatever it is.
    mass = (logits.double() / temperature).softmax(dim=1).cumsum(dim=1)
    draw = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    token = torch.searchsorted(mass, draw.to(mass.device) * mass[:, -1:], right=True)
    return token[:, 0].clamp(max=logits.shape[1] - 1)
