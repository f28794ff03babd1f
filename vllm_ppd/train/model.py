"""The frozen Hugging Face model, and the table of prompt embeddings trained for it.

The ordinary rows run once without gradients and leave their keys and values in the
model's own cache; the prompt rows run after them against that cache. This is one pass
over [ordinary][prompt] rows, cut where the gradient begins: ordinary rows do not see
prompt rows, so no gradient that reaches them concerns the prompt table. Compared with
one call over all rows, it saves their backward pass and their activations.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from vllm_ppd.hub import resolve_model_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.insertion import Insertion
from vllm_ppd.train.settings import TrainingError, cpu_dtype

# Copies of one ensemble member would get equal gradients and stay equal for ever.
_COPY_NOISE = 0.02
# AdamW moves every coordinate by about the learning rate, whatever the gradient, so
# the rate that suits a model is in proportion to its embeddings. Two is for trainings
# of RATE_STEPS steps and more.
_RATE_PER_RMS = 2.0
_RATE_SAMPLE = 4096


@dataclass(frozen=True, eq=False)
class OrdinaryRows:
    """Output and KV cache of the ordinary rows, which the prompt rows need."""

    hidden: torch.Tensor
    """[batch, T, hidden], the last layer's output, ready for the vocabulary head."""
    cache: DynamicCache

    def drop_prompt_rows(self) -> None:
        """Cut the cache back to the ordinary rows, so that others can follow them.

        To be called after the backward pass of the rows that are dropped.
        """
        length = self.hidden.shape[1]
        for layer in self.cache.layers:
            # Detached, because the rows that go bring their gradient's history.
            layer.keys = layer.keys[..., :length, :].detach()
            layer.values = layer.values[..., :length, :].detach()


class FrozenModel:
    """Any decoder-only Hugging Face model with full attention; never trained.

    Raises TrainingError when the model has no vocabulary head, when its logits are
    computed in a way unknown here, when tokens see later ones, or when `max_length`
    does not fit its attention.
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        if model.get_output_embeddings() is None:
            raise TrainingError(
                f"{type(model).__name__} has no vocabulary head; expected a causal "
                "language model"
            )
        self._check_length(max_length)
        self._check_head()

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        max_length: int | None = None,
    ) -> FrozenModel:
        """Read a model folder; `dtype` is one of auto, float32, bfloat16, float16.

        auto is the checkpoint's own, and float32 on a CPU without bfloat16. Raises
        TrainingError when the folder holds no causal language model.
        """
        on_cpu = torch.device(device).type == "cpu"
        if dtype == "auto" and on_cpu and cpu_dtype() == "float32":
            dtype = "float32"
        try:
            model = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"{str(folder)!r} cannot be loaded as a causal language model "
                f"({reason}); expected its config.json and weights"
            ) from error
        return cls(model.to(device), max_length)

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., hidden] of token ids [...], in the model's dtype."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [..., vocabulary] of last-layer rows [..., hidden]."""
        logits = self.model.get_output_embeddings()(hidden)
        # Architectures scale or cap logits under these shared names.
        if (scale := getattr(self.config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float()

    @torch.no_grad()
    def ordinary_rows(self, ids: torch.Tensor) -> OrdinaryRows:
        """Run token ids [batch, T] causally."""
        cache = DynamicCache()
        # No mask is passed, which leaves fast causal kernels in use.
        output = self.model.base_model(
            input_ids=ids, past_key_values=cache, use_cache=True
        )
        return OrdinaryRows(output.last_hidden_state, cache)

    def prompt_rows(
        self, embeddings: torch.Tensor, insertion: Insertion, ordinary: OrdinaryRows
    ) -> torch.Tensor:
        """Last-layer output [batch, R, hidden] of the prompt rows, differentiable.

        `embeddings` [m, e, hidden] is the prompt table in any floating dtype. The cache
        of `ordinary` grows by the prompt rows; see `OrdinaryRows.drop_prompt_rows`.
        """
        batch, points = insertion.points.shape
        # Repeated before the cast: gradients of all points then add up in float32.
        rows = embeddings.float().flatten(0, 1).repeat(points, 1)
        rows = rows.expand(batch, -1, -1).to(self.model.dtype)
        # transformers leaves four-dimensional masks as they are; additive ones suit the
        # eager and the sdpa attention alike.
        allowed = insertion.mask()
        mask = torch.zeros(allowed.shape, dtype=rows.dtype, device=self.device)
        output = self.model.base_model(
            inputs_embeds=rows,
            attention_mask=mask.masked_fill_(~allowed, torch.finfo(rows.dtype).min),
            position_ids=insertion.position_ids(),
            past_key_values=ordinary.cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _check_length(self, length: int | None) -> None:
        limits = {"max_position_embeddings": "positions"}
        # Qwen keeps a sliding_window in its config with the feature off.
        if getattr(self.config, "use_sliding_window", True):
            limits["sliding_window"] = "tokens of sliding attention window"
        for key, unit in limits.items():
            limit = getattr(self.config, key, None)
            if length is not None and isinstance(limit, int) and length > limit:
                raise TrainingError(
                    f"length {length} exceeds the model's {limit} {unit}; "
                    f"expected at most {limit}: lower the length"
                )

    @torch.no_grad()
    def _check_head(self) -> None:
        """Our parts put together must give the model's own logits, and causally."""
        ids = torch.tensor([[1, 2, 3, 4]], device=self.device)
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        shorter = self.model(input_ids=ids[:, :2], use_cache=False).logits.float()
        if not _agree(own[:, :2], shorter):
            raise TrainingError(
                f"{type(self.model).__name__} lets tokens see later ones; expected a "
                "causal language model"
            )
        hidden = None
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            hidden = self.ordinary_rows(ids).hidden
        if hidden is not None and _agree(own, self.logits(hidden)):
            return
        raise TrainingError(
            f"{type(self.model).__name__} computes its logits in a way that is not "
            "supported (base model and vocabulary head do not reproduce them); "
            "expected a decoder-only text model"
        )


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Half precision rounds the two paths differently, by far less than a wrong scale.
    spread: Any = one.std()
    return one.shape == other.shape and bool((one - other).abs().max() < 0.05 * spread)


def located_model(
    model: str, name: str | None = None
) -> tuple[BaseModelFingerprint, Path]:
    """Fingerprint and folder of a model, given by folder or hub id, named `name`."""
    is_folder = os.path.isdir(model)
    folder = resolve_model_path(model)
    name = name or (None if is_folder else model)
    # A hub snapshot's folder is named after its commit.
    revision = None if is_folder else folder.name
    return BaseModelFingerprint.of_folder(folder, name=name, revision=revision), folder


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
    tokens repeat the last, and further ensemble members repeat the given ones with a
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
