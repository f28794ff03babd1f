"""The frozen Hugging Face model, seen as embeddings, transformer and vocabulary head.

The ordinary rows run once without gradients and leave their keys and values in the
model's own cache; the prompt rows run after them against that cache. This is one pass
over [ordinary][prompt] rows, cut where the gradient begins: ordinary rows do not see
prompt rows, so no gradient that reaches them concerns the prompt table. Compared with
one call over all rows, it saves their backward pass and their activations.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
)

from vllm_ppd.train.insertion import Insertion, token_positions
from vllm_ppd.train.settings import Quantization

__all__ = ["FrozenModel", "ModelError", "OrdinaryRows"]


class ModelError(ValueError):
    """A model that prompt tokens cannot be trained for."""


@dataclass(frozen=True, eq=False)
class OrdinaryRows:
    """What the pass over the sequence leaves for the prompt rows."""

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

    Raises ModelError when the model has no vocabulary head, when its logits are
    computed in a way unknown here, when tokens see later ones, or when `max_length`
    does not fit its attention.
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        if model.get_output_embeddings() is None:
            raise ModelError(
                f"{type(model).__name__} has no vocabulary head; expected a causal "
                "language model"
            )
        self.uses_flex_attention = False
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
        quantization: Quantization | None = None,
    ) -> FrozenModel:
        """Read a model folder; `dtype` is one of auto, float32, bfloat16, float16.

        With `quantization` the weights but embeddings and head take 4 bits (NF4), and
        auto is bfloat16. Raises ModelError when the folder holds no causal language
        model, or when 4 bits are asked for without a GPU or bitsandbytes.
        """
        options: dict[str, Any] = {"dtype": dtype}
        if quantization is not None:
            options = _four_bit_options(dtype, torch.device(device))
        try:
            model = AutoModelForCausalLM.from_pretrained(Path(folder), **options)
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            SafetensorError,
        ) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{str(folder)!r} cannot be loaded as a causal language model: {reason}"
            ) from error
        # Quantised weights are where they belong already, and refuse to be moved.
        return cls(model if quantization else model.to(device), max_length)

    @property
    def hidden_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def supports_flex_attention(self) -> bool:
        """Whether transformers has FlexAttention for this architecture."""
        return bool(getattr(self.model, "_supports_flex_attn", False))

    def use_flex_attention(self) -> None:
        """Attend by FlexAttention from now on, the prompt rows with a block mask.

        It skips blocks that no row sees, where the plain mask is added to every score;
        gradients need a GPU. Raises ModelError when the architecture has none.
        """
        if not self.supports_flex_attention:
            raise ModelError(
                f"{type(self.model).__name__} does not support FlexAttention; use "
                "--attention plain"
            )
        self.model.set_attn_implementation("flex_attention")
        self.uses_flex_attention = True

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., hidden] of token ids [...], in the model's dtype."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [..., vocabulary] of last-layer rows [..., hidden]."""
        logits = self.model.get_output_embeddings()(hidden)
        # What some families do between head and logits, under the names they share.
        if (scale := getattr(self.config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float()

    @torch.no_grad()
    def ordinary_rows(
        self, ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> OrdinaryRows:
        """Run token ids [batch, T] causally; `attention_mask` [batch, T] is bool."""
        cache = DynamicCache()
        # Without padding no mask is passed, which leaves fast causal kernels in use.
        padded = not bool(attention_mask.all())
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=attention_mask.long() if padded else None,
            position_ids=token_positions(attention_mask),
            past_key_values=cache,
            use_cache=True,
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
        rows = rows.expand(batch, -1, -1).to(self.dtype)
        output = self.model.base_model(
            inputs_embeds=rows,
            attention_mask=self._prompt_mask(insertion),
            position_ids=insertion.position_ids(),
            past_key_values=ordinary.cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _prompt_mask(self, insertion: Insertion) -> torch.Tensor | BlockMask:
        # Four-dimensional masks go through transformers untouched.
        if self.uses_flex_attention:
            batch, length = insertion.attention_mask.shape
            count = insertion.position_ids().shape[1]
            return create_block_mask(
                insertion.mask_mod(),
                batch,
                None,
                count,
                length + count,
                device=self.device,
            )
        allowed = insertion.mask()
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        # Additive masks suit the eager and the sdpa attention alike.
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)

    def _check_length(self, length: int | None) -> None:
        limits = {
            "max_position_embeddings": "positions",
            "sliding_window": "tokens of sliding attention window",
        }
        for key, unit in limits.items():
            limit = getattr(self.config, key, None)
            # Qwen keeps a sliding_window in its config with the feature off.
            off = key == "sliding_window" and not getattr(
                self.config, "use_sliding_window", True
            )
            if length is None or not isinstance(limit, int) or off:
                continue
            if length > limit:
                raise ModelError(
                    f"length {length} exceeds the model's {limit} {unit}; "
                    f"expected at most {limit}: lower the length"
                )

    @torch.no_grad()
    def _check_head(self) -> None:
        """Our parts put together must give the model's own logits, and causally."""
        ids = torch.tensor([[1, 2, 3, 4]], device=self.device)
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        before = self.model(input_ids=ids[:, :2], use_cache=False).logits.float()
        if not _agree(own[:, :2], before):
            raise ModelError(
                f"{type(self.model).__name__} lets tokens see later ones; expected a "
                "causal language model"
            )
        hidden = None
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            mask = torch.ones_like(ids).bool()
            hidden = self.ordinary_rows(ids, mask).hidden
        if hidden is not None and _agree(own, self.logits(hidden)):
            return
        raise ModelError(
            f"{type(self.model).__name__} computes its logits in a way that is not "
            "supported (base model and vocabulary head do not reproduce them); "
            "expected a decoder-only text model"
        )


def _four_bit_options(dtype: str, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained for NF4 weights on `device`."""
    if device.type != "cuda":
        raise ModelError(
            f"a 4-bit model needs an NVIDIA GPU, and this runs on {device.type}; leave "
            "out --load-in-4bit"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "a 4-bit model needs the package bitsandbytes: pip install bitsandbytes, "
            "or leave out --load-in-4bit"
        )
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return {
        "dtype": compute,
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
    }


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Half precision rounds the two paths differently, by far less than a wrong scale.
    spread: Any = one.std()
    return one.shape == other.shape and bool((one - other).abs().max() < 0.05 * spread)
