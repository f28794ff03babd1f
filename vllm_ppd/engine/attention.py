"""The attention of both runners: one step's trees on their way to the kernels, and
vLLM's backends with the tree kernel for the rows that need it.

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
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ppd.config import PPDConfigError

# vLLM calls metadata builders with no room for another argument, so a step's trees wait
# here for them. A process builds the metadata of one step at a time.
_current: Any = None


def set_current_step(trees: Any) -> None:
    """Called by a runner before vLLM builds a step's metadata, with V1's or V2's
    `StepTrees`; with None after it, and in a plain step."""
    global _current
    _current = trees


def register_tree_backend(replaced: AttentionBackendEnum, path: str) -> None:
    """Have vLLM choose PPD's backend, whatever it chose for engines before this one."""
    register_backend(replaced, path)
    selector._cached_get_attn_backend.cache_clear()


def require_tree_attention(runner: Any) -> None:
    """Refuse attention that would mask tree rows causally, whatever chose it.

    Args:
        runner: a model runner whose KV caches are there.

    Raises:
        PPDConfigError: a layer of an unknown kind, or whose implementation or cached
            values PPD's kernels do not fit.
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
            raise PPDConfigError(
                "speculative method 'ppd' needs its own attention backend, and "
                f"{name} runs {type(layer.impl).__name__}: leave out "
                "--attention-backend, or serve this model without PPD"
            )
        if layer.kv_cache_torch_dtype != dtype:
            raise PPDConfigError(
                f"speculative method 'ppd' needs a KV cache of {dtype}, the model's "
                f"type, and {name} has one of {layer.kv_cache_torch_dtype}: serve "
                "this model without PPD"
            )


class TreeMetadataMixin:
    """Goes before a metadata builder; its metadata carry the step's tree attention."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if _current is not None and not _current.only_trees:
            common_attn_metadata = _current.for_stock_kernel(common_attn_metadata)
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, *args, **kwargs
        )
        metadata.ppd_plan, metadata.ppd_only_trees = None, False
        if _current is not None:
            blocks = common_attn_metadata.block_table_tensor
            metadata.ppd_plan = _current.attention(blocks)
            metadata.ppd_only_trees = _current.only_trees
        return metadata


class TreeImplMixin:
    """Goes before an attention implementation; runs the tree kernel on top."""

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
        impl: Any = self
        plan = getattr(attn_metadata, "ppd_plan", None)
        if plan is None or not attn_metadata.ppd_only_trees:
            given = (layer, query, key, value, kv_cache, attn_metadata, output)
            output = super().forward(*given, *args, **kwargs)  # type: ignore[misc]
        if plan is not None:
            scale, softcap = impl.scale, impl.logits_soft_cap
            plan.run(query, kv_cache, output, scale, softcap, self._window)
        return output


def tree_backend(
    name: str, module: str, stock: Any, implementation: type, builder: type, **kw: str
) -> Any:
    """A backend of vLLM with tree attention.

    Args:
        name, module: of the class, by which vLLM finds it.
        stock: the backend, with its implementation and metadata builder.
        kw: what its methods return besides.
    """
    returned = {
        "get_impl_cls": type(f"{name}Impl", (TreeImplMixin, implementation), {}),
        "get_builder_cls": type(f"{name}Builder", (TreeMetadataMixin, builder), {}),
        **kw,
    }

    def returns(value: Any) -> Any:
        return staticmethod(lambda: value)

    methods = {method: returns(value) for method, value in returned.items()}
    return type(name, (stock,), {**methods, "__module__": module})


class _VectorBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, without AMX, which packs the cache in tiles that no tree kernel reads."""

    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == "amx":
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)


PPDCPUAttentionBackend = tree_backend(
    "PPDCPUAttentionBackend",
    __name__,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    _VectorBuilder,
)
