"""Tree attention against vLLM's FlashAttention on the same rows.

FlashAttention takes the rows as a chain, which is what it knows; the tree kernel takes
them as a random tree. Both read the same paged cache, and both are checked against each
other on a chain first. Times are per layer, within a CUDA graph over several layers.

    python benchmarks/gpu_tree_attention.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_tree_attention.py --dry-run    # tiny, on a CPU, interpreted

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import choose_device, finish, microseconds
from stats import Spread

from vllm_ppd.kernels.tree_attention import TreeBatch, tree_attention_reference
from vllm_ppd.trees.layout import pack_mask

# (heads, KV heads, head size) of models in use.
SHAPES = {
    "1b": (32, 8, 64),  # Llama 3.2 1B
    "7b": (32, 32, 128),  # Vicuna 7B
    "8b": (32, 8, 128),  # Llama 3.1 8B
    "13b": (40, 40, 128),  # Vicuna 13B
}
# Of two kernels' outputs, 16-bit values of order 1.
TOLERANCE = 0.02
# Several times any GPU's own cache.
CACHE_BYTES = 1 << 28


@dataclass(frozen=True)
class Cell:
    """One measurement: what runs, and how much of it."""

    shape: str
    heads: int
    kv_heads: int
    head_size: int
    batch: int
    rows: int
    context: int

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @property
    def tokens(self) -> int:
        """Slots of one request."""
        return self.context + self.rows

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of all requests in one layer."""
        values = 2 * self.kv_heads * self.head_size * self.tokens * self.batch
        return values * dtype.itemsize


class Step:
    """The tensors of a cell."""

    def __init__(
        self, cell: Cell, block_size: int, dtype: torch.dtype, device: torch.device
    ):
        self.cell = cell
        per_request = -(-cell.tokens // block_size)
        blocks = per_request * cell.batch
        layers = max(1, min(64, -(-CACHE_BYTES // cell.layer_bytes(dtype))))
        if device.type == "cpu":
            layers = 2
        # [num_blocks, KV heads, block size, 2 * head size], tokens of a block together:
        # how vLLM lays its caches out for FlashAttention.
        shape = blocks, block_size, cell.kv_heads, 2 * cell.head_size
        self.caches = [
            torch.randn(shape, dtype=dtype, device=device).transpose(1, 2)
            for _ in range(layers)
        ]
        order = torch.randperm(blocks).to(device, torch.int32)
        self.table = order.view(cell.batch, per_request)
        tokens = cell.batch * cell.rows
        self.query = torch.randn(
            tokens, cell.heads, cell.head_size, dtype=dtype, device=device
        )
        self.output = torch.zeros_like(self.query)
        self.starts = torch.arange(0, tokens + 1, cell.rows, dtype=torch.int32)
        self.starts = self.starts.to(device)

    def batch(self, parents: Sequence[int]) -> TreeBatch:
        """All requests with one tree; parents: of every row but the root."""
        cell, device = self.cell, self.query.device
        mask, depths = np.eye(cell.rows, dtype=bool), [0]
        for row, parent in enumerate(parents, start=1):
            mask[row] |= mask[parent]
            depths.append(depths[parent] + 1)

        def each(value: int) -> torch.Tensor:
            return torch.full((cell.batch,), value, dtype=torch.int32, device=device)

        ancestors = torch.from_numpy(pack_mask(mask)).repeat(cell.batch, 1)
        return TreeBatch(
            self.table,
            self.starts[:-1],
            each(cell.rows),
            each(cell.context),
            ancestors.to(device),
            torch.tensor(depths * cell.batch, dtype=torch.int32, device=device),
            cell.rows,
        )

    @cached_property
    def chain(self) -> TreeBatch:
        return self.batch(range(self.cell.rows - 1))

    @cached_property
    def tree(self) -> TreeBatch:
        return self.batch([random.randrange(r) for r in range(1, self.cell.rows)])


def run_tree(step: Step, cache: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    from vllm_ppd.kernels.triton.tree_attention import tree_attention

    keys, values = cache.split(step.cell.head_size, dim=-1)
    tree_attention(step.query, keys, values, step.output, batch, step.cell.scale)
    return step.output


def run_reference(step: Step, cache: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """What `run_tree` has to compute."""
    keys, values = cache.split(step.cell.head_size, dim=-1)
    inputs = step.query, keys, values, step.output
    tree_attention_reference(*inputs, batch, step.cell.scale)
    return step.output


def on_a_chain(step: Step) -> Callable[[torch.Tensor], torch.Tensor]:
    """FlashAttention, or the reference where there is no GPU."""
    if step.query.device.type == "cuda":
        return flash_attention(step)
    return partial(run_reference, step, batch=step.chain)


def flash_attention(step: Step) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's own call, of the version that vLLM chooses for this GPU."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    cell = step.cell
    version = get_flash_attn_version(head_size=cell.head_size)
    lengths = torch.full_like(step.starts[:-1], cell.tokens)

    def run(cache: torch.Tensor) -> torch.Tensor:
        keys, values = cache.transpose(1, 2).split(cell.head_size, dim=-1)
        flash_attn_varlen_func(
            q=step.query,
            k=keys,
            v=values,
            out=step.output,
            cu_seqlens_q=step.starts,
            max_seqlen_q=cell.rows,
            seqused_k=lengths,
            max_seqlen_k=cell.tokens,
            softmax_scale=cell.scale,
            causal=True,
            block_table=step.table,
            fa_version=version,
        )
        return step.output

    return run


def measure(step: Step, repeats: int) -> dict[str, Any]:
    """Both kernels' times in microseconds per layer, and how far they differ."""
    device = step.query.device
    flash = on_a_chain(step)
    cache = step.caches[0]
    expected = flash(cache).float().clone()
    difference = (run_tree(step, cache, step.chain).float() - expected).abs().max()
    tree_calls = [partial(run_tree, step, cache, step.tree) for cache in step.caches]
    flash_calls = [partial(flash, cache) for cache in step.caches]
    tree = microseconds(tree_calls, device, repeats)
    flashed = microseconds(flash_calls, device, repeats)
    figures = {"tree": Spread.of(tree), "flash": Spread.of(flashed)}
    moved = step.cell.layer_bytes(cache.dtype)
    return {
        **asdict(step.cell),
        **{f"{name}_us": spread.to_dict(2) for name, spread in figures.items()},
        "ratio": round(figures["tree"].median / figures["flash"].median, 3),
        # Of what has to be read at least; compare with the GPU's memory.
        "tree_gb_per_s": round(moved / figures["tree"].median / 1e3, 1),
        "largest_difference": float(difference),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["7b", "8b"], help="models"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 32, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--block-size", type=int, default=16, help="slots per block")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of all"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timings per cell")
    parser.add_argument("--out", type=Path, help="write the JSON document here, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes; also without a GPU"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = choose_device(args.dry_run)
    shapes = {name: SHAPES[name] for name in args.shapes}
    if args.dry_run:
        shapes = {"tiny": (4, 2, 16)}
        args.rows, args.contexts, args.batches, args.repeats = [1, 5], [20], [2], 2
    torch.manual_seed(0)
    random.seed(0)
    print(f"{'':6}batch  context  rows   flash us    tree us  ratio  difference")
    cells = []
    for name, (heads, kv_heads, size) in shapes.items():
        for batch in args.batches:
            for context in args.contexts:
                for rows in args.rows:
                    cell = Cell(name, heads, kv_heads, size, batch, rows, context)
                    dtype = getattr(torch, args.dtype)
                    step = Step(cell, args.block_size, dtype, device)
                    found = measure(step, args.repeats)
                    cells.append(found)
                    print(
                        f"{name:6}{batch:5}{context:9}{rows:6}"
                        f"{found['flash_us']['median']:11.1f}"
                        f"{found['tree_us']['median']:11.1f}{found['ratio']:7.2f}"
                        f"{found['largest_difference']:12.2g}",
                        flush=True,
                    )
    flash = "vLLM's FlashAttention" if device.type == "cuda" else "a torch stand-in"
    finish("ppd_gpu_tree_attention", args, device, flash=flash, cells=cells)
    wrong = [cell for cell in cells if cell["largest_difference"] > TOLERANCE]
    if wrong:
        raise SystemExit(
            f"{len(wrong)} of {len(cells)} cells are wrong: their largest_difference "
            f"is above {TOLERANCE}"
        )


if __name__ == "__main__":
    main()
