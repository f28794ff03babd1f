"""What the attention of both runners has in common: one step's trees on their way to
the kernels, and the implementation that runs them.

The stock kernels know causal rows only. In a step with trees the stock kernel runs for
the whole batch unless the batch is nothing but trees, and the tree kernel then writes
the tree rows' attention over what it left.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.v1.attention.selector as selector
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ppd.config import PPDConfigError

# vLLM calls metadata builders with no room for another argument, so a step's trees wait
# here for them. A process builds the metadata of one step at a time.
_current: Any = None


def current_step() -> Any:
    """The trees for which attention metadata is being built; None in a plain step."""
    return _current


def set_current_step(trees: Any) -> None:
    """Called by a runner before vLLM builds the step's metadata; with None after it."""
    global _current
    _current = trees


def register_tree_backend(replaced: AttentionBackendEnum, path: str) -> None:
    """Have vLLM choose PPD's backend, whatever it chose for engines before this one."""
    register_backend(replaced, path)
    selector._cached_get_attn_backend.cache_clear()


def require_tree_attention(runner: Any, builder: type) -> None:
    """Refuse attention that would mask tree rows causally, whatever chose it.

    Args:
        runner: a model runner whose KV caches and metadata builders are there.
        builder: base class of metadata builders that hand trees on.

    Raises:
        PPDConfigError: a layer of an unknown kind, or whose implementation, metadata
            builder or cached values PPD's kernels do not fit.
    """
    dtype = runner.vllm_config.model_config.dtype
    layers = runner.compilation_config.static_forward_context
    for name, layer in layers.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        # A subclass limits what a row sees in a way that no tree kernel knows.
        if type(layer) is not Attention:
            raise PPDConfigError(
                "speculative method 'ppd' knows vLLM's plain Attention layers, and "
                f"{name} is {type(layer).__name__}: serve this model without PPD"
            )
        if not isinstance(layer.impl, TreeImplMixin):
            raise _foreign_backend(name, type(layer.impl))
        if layer.kv_cache_torch_dtype != dtype:
            raise PPDConfigError(
                f"speculative method 'ppd' needs a KV cache of {dtype}, the model's "
                f"type, and {name} has one of {layer.kv_cache_torch_dtype}: serve "
                "this model without PPD"
            )
    for group in (group for groups in runner.attn_groups for group in groups):
        for built in group.metadata_builders:
            if not isinstance(built, builder):
                raise _foreign_backend(group.layer_names[0], type(built))


def _foreign_backend(name: str, kind: type) -> PPDConfigError:
    return PPDConfigError(
        "speculative method 'ppd' needs its own attention backend, and "
        f"{name} runs {kind.__name__}: leave out --attention-backend, or serve this "
        "model without PPD"
    )


class TreeImplMixin:
    """Goes before an attention implementation; runs the tree kernel on top.

    A metadata builder of PPD puts `ppd_plan` (with a method `run`) and
    `ppd_only_trees` into the metadata of steps that have trees.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "sinks", None) is not None:
            raise ValueError(
                "speculative method 'ppd' does not support attention sinks: serve "
                "this model without PPD"
            )

    @property
    def _window(self) -> int:
        """Keys a row may see under a sliding window; not positive for all."""
        # FlashAttention keeps (keys to the left, keys to the right).
        window = self.sliding_window  # type: ignore[attr-defined]
        return window[0] + 1 if isinstance(window, tuple) else window

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        plan = getattr(attn_metadata, "ppd_plan", None)
        if plan is None or not attn_metadata.ppd_only_trees:
            output = super().forward(  # type: ignore[misc]
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                *args,
                **kwargs,
            )
        if plan is not None:
            plan.run(
                query,
                kv_cache,
                output,
                self.scale,  # type: ignore[attr-defined]
                self.logits_soft_cap,  # type: ignore[attr-defined]
                self._window,
            )
        return output
