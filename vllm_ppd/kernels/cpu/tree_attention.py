"""Tree attention on CPU: a per-step plan around the compiled kernel."""

from __future__ import annotations

import ctypes

import torch

from vllm_ppd.kernels.cpu.build import load_library, struct
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.tree_attention import TreeBatch, tree_attention_reference

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAILURES = {
    1: "out of memory",
    2: "a request has more rows than 128, or than its ancestor masks have bits",
    3: "unknown element type",
    4: "a request's rows or blocks lie outside the step or the KV cache",
}


_Plan = struct(  # as in tree_attention.cpp
    ["block_table", "starts", "num_rows", "context_lens", "ancestors", "depths"],
    ["num_requests", "mask_words", "table_stride", "table_width", "num_tokens"],
)


class CpuTreeAttention:
    """One step's tree attention, built once and run for every layer.

    The batch's tensors are on the CPU and must not change while the plan is in use.
    """

    def __init__(self, batch: TreeBatch) -> None:
        self.batch = batch
        self._library = load_library()
        table = batch.block_table
        if table.stride(1) != 1:
            table = table.contiguous()
        # No copies when the tensors already are what the kernel reads.
        small = [
            tensor.to(torch.int32).contiguous()
            for tensor in (batch.starts, batch.num_rows, batch.context_lens)
        ]
        ancestors = batch.ancestors.contiguous()
        depths = batch.depths.to(torch.int32).contiguous()
        self._tensors = (table, *small, ancestors, depths)  # keep the memory alive
        self._plan = _Plan(
            *(tensor.data_ptr() for tensor in self._tensors),
            table.shape[0],
            ancestors.shape[1],
            *(table.stride(0), table.shape[1], len(ancestors)),
        )
        self._address = ctypes.addressof(self._plan)
        if self._library is not None:
            self._kernel = self._library.ppd_tree_attention
            self._lanes = self._library.ppd_vector_lanes()

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> None:
        """Write the tree rows' attention into `output`; other rows are untouched.

        Args:
            query: [T, H, D], D contiguous
            kv_cache: [num_blocks, kv_heads, block_size, 2 * D] as in `layout`
            output: [T, H, D], D contiguous
            scale: softmax scale
            softcap: logits soft cap, <= 0 for none
            window: sliding window in tokens, <= 0 for none
        """
        _, heads, dim = query.shape
        num_blocks, kv_heads, block_size, _ = kv_cache.shape
        query_token, query_head, query_one = query.stride()
        output_token, output_head, output_one = output.stride()
        block, kv_head, slot, one = kv_cache.stride()
        dtype = query.dtype
        if kv_cache.dtype != dtype or output.dtype != dtype:
            raise ValueError(_mismatch(query, kv_cache, output))
        if (
            self._library is None
            or dim % self._lanes
            or block_size % self._lanes
            or dtype not in _DTYPES
        ):
            keys, values = key_view(kv_cache), value_view(kv_cache)
            tree_attention_reference(
                query, keys, values, output, self.batch, scale, softcap, window
            )
            return
        if query_one * output_one * one != 1 or slot != 2 * dim or heads % kv_heads:
            raise ValueError(_mismatch(query, kv_cache, output))
        status = self._kernel(
            self._address,
            query.data_ptr(),
            kv_cache.data_ptr(),
            output.data_ptr(),
            _DTYPES[dtype],
            *(num_blocks, heads, kv_heads, dim, block_size),
            *(query_token, query_head, block, kv_head, output_token, output_head),
            *(scale, softcap, window),
        )
        if status:
            raise RuntimeError(f"tree attention failed: {_FAILURES[status]}")


def _mismatch(*tensors: torch.Tensor) -> str:
    described = ", ".join(
        f"{name} {tensor.dtype} {list(tensor.shape)} strides {tensor.stride()}"
        for name, tensor in zip(("query", "kv_cache", "output"), tensors, strict=True)
    )
    return f"tree attention needs one element type and contiguous rows: {described}"
