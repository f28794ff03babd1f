"""The only trainable parameters: the table of prompt embeddings, and its start."""

from __future__ import annotations

import torch

from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.model import FrozenModel

__all__ = ["PromptTable", "default_learning_rate", "initial_table"]

# Copies of one ensemble member would get equal gradients and stay equal for ever.
_COPY_NOISE = 0.02


# AdamW moves every coordinate by about the learning rate, whatever the gradient, so
# the rate that suits a model is in proportion to its embeddings. Two is for trainings
# of RATE_STEPS steps and more.
_RATE_PER_RMS = 2.0
_RATE_SAMPLE = 4096


class PromptTable(torch.nn.Module):
    """`embeddings`, a float32 parameter [m, e, hidden]; calling it returns them."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.embeddings = torch.nn.Parameter(embeddings.detach().float().clone())

    def forward(self) -> torch.Tensor:
        # A view, so that wrappers that hook a module's output see a non-leaf.
        return self.embeddings.view_as(self.embeddings)


def default_learning_rate(model: FrozenModel, stream: TokenStream) -> float:
    """AdamW's rate for the table: twice the root mean square of the embeddings.

    Taken over the first tokens of the training text, and rounded to two digits, so
    that a run continued elsewhere finds the same.
    """
    ids = stream.tokens[:_RATE_SAMPLE].long().to(model.device)
    rms = model.embed(ids).float().square().mean().sqrt().item()
    return float(f"{_RATE_PER_RMS * rms:.2g}")


def initial_table(
    init: str | PromptTokens,
    shape: tuple[int, int],
    model: FrozenModel,
    stream: TokenStream,
    seed: int,
) -> torch.Tensor:
    """float32 [m, e, hidden] to start training `shape` = (m, e) from.

    `init` is "text" (embeddings of tokens drawn from the training text), "vocabulary"
    (of tokens drawn from the vocabulary), or prompt tokens, of which further prompt
    tokens repeat the last and further ensemble members repeat those there are, with a
    little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(init, PromptTokens):
        return _resized(init.embeddings, shape, generator)
    if init == "text":
        drawn = torch.randint(stream.tokens.numel(), shape, generator=generator)
        ids = stream.tokens[drawn].long()
    else:
        ids = torch.randint(model.vocab_size, shape, generator=generator)
    return model.embed(ids.to(model.device)).float()


def _resized(
    table: torch.Tensor, shape: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    distances, ept = shape
    rows = torch.arange(distances).clamp(max=table.shape[0] - 1)
    members = torch.arange(ept)
    grown = table[rows][:, members % table.shape[1]]
    noise = torch.randn(grown.shape, generator=generator) * table.std() * _COPY_NOISE
    copied = (members >= table.shape[1])[None, :, None]
    return torch.where(copied, grown + noise, grown)
