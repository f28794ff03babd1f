"""The KV caches whose rows move after verification."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_ppd.config import PPDConfigError


def attention_caches(runner: Any) -> list[list[torch.Tensor]]:
    """The caches of each KV cache group, each one once.

    Args:
        runner: a model runner whose KV caches are allocated.

    Raises:
        PPDConfigError: a cache that is not plain attention's.
    """
    layers = runner.compilation_config.static_forward_context
    groups = []
    for group in runner.kv_cache_config.kv_cache_groups:
        if not isinstance(group.kv_cache_spec, FullAttentionSpec | SlidingWindowSpec):
            raise PPDConfigError(
                "speculative method 'ppd' needs plain attention layers, not "
                f"{type(group.kv_cache_spec).__name__}: serve without PPD"
            )
        # Layers may share one cache; moving its rows twice would lose them.
        caches = {
            cache.data_ptr(): cache
            for name in group.layer_names
            if (cache := layers[name].kv_cache) is not None
        }
        groups.append(list(caches.values()))
    return groups
