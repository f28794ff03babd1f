"""How long PPD's GPU kernels take, each within a CUDA graph.

    python benchmarks/gpu_kernels.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_kernels.py --dry-run   # tiny, on a CPU, interpreted

- attention: tree attention on a random tree, per layer, against vLLM's FlashAttention
  on as many causal rows of the same paged cache. Both are compared on a chain first.
- step: what a PPD step runs besides the forward pass: the walk along the sampled tokens
  and the KV moves of the deepest path in all layers, and before the next step the
  draft tokens and the layout of the trees.

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from published import SHAPES, TABLE, load_table
from results import Spread, environment_card, finish, parser_of, results_document

from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.kernels.tree_attention import TreeBatch, tree_attention_reference
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import best_policy
from vllm_ppd.trees.bigram import BigramTensors
from vllm_ppd.trees.drafting import POOL
from vllm_ppd.trees.layout import TreeTables, pack_mask

VOCABULARY = 32000
# Of two kernels' outputs, 16-bit values of order 1.
TOLERANCE = 0.02
# Several times any GPU's own cache.
CACHE_BYTES = 1 << 28


def choose_device(dry_run: bool) -> torch.device:
    """The GPU, or the CPU with Triton's interpreter for a dry run.

    To be called before Triton is imported. Raises SystemExit without a GPU where no dry
    run is asked for.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not dry_run:
        raise SystemExit(
            "no GPU was found, and without one there is nothing to measure: use a "
            "machine with an NVIDIA GPU, or add --dry-run to see that the script runs"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def microseconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int
) -> list[float]:
    """Time per call, one figure per repeat.

    The calls, one per layer, run as one CUDA graph, as in serving: what the host does
    to launch them does not count. Give them caches that together exceed the GPU's own
    cache, or they find in it what a real step has to fetch.
    """
    for call in calls:
        call()  # compiles
    if device.type == "cpu":
        began = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - began) / len(calls) * 1e6] * repeats
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / len(calls))
    return times


class Attention:
    """The tensors of an attention measurement, and the kernels on them.

    `batch` requests have `rows` rows each and `context` tokens before them.
    """

    def __init__(
        self,
        shape: str,
        batch: int,
        rows: int,
        context: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        *_, heads, kv_heads, self.head_size, _ = SHAPES[shape]
        self.batch, self.rows, self.context = batch, rows, context
        self.device = device
        self.about = {"shape": shape, "batch": batch, "rows": rows, "context": context}
        per_request = -(-(context + rows) // block_size)
        blocks = per_request * batch
        values = 2 * kv_heads * self.head_size * (context + rows) * batch
        # Keys and values of all requests in one layer.
        self.layer_bytes = values * dtype.itemsize
        layers = max(1, min(64, -(-CACHE_BYTES // self.layer_bytes)))
        # [num_blocks, KV heads, block size, 2 * head size], tokens of a block together:
        # how vLLM lays its caches out for FlashAttention.
        size = blocks, block_size, kv_heads, 2 * self.head_size
        self.caches = [
            torch.randn(size, dtype=dtype, device=device).transpose(1, 2)
            for _ in range(2 if device.type == "cpu" else layers)
        ]
        order = torch.randperm(blocks).to(device, torch.int32)
        self.table = order.view(batch, per_request)
        queries = batch * rows, heads, self.head_size
        self.query = torch.randn(queries, dtype=dtype, device=device)
        self.output = torch.zeros_like(self.query)
        starts = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32)
        self.starts = starts.to(device)

    def _batch(self, parents: Sequence[int]) -> TreeBatch:
        """All requests with one tree; parents: of every row but the root."""
        mask, depths = np.eye(self.rows, dtype=bool), [0]
        for row, parent in enumerate(parents, start=1):
            mask[row] |= mask[parent]
            depths.append(depths[parent] + 1)
        fixed = {"dtype": torch.int32, "device": self.device}
        return TreeBatch(
            self.table,
            self.starts[:-1],
            torch.full((self.batch,), self.rows, **fixed),
            torch.full((self.batch,), self.context, **fixed),
            torch.from_numpy(pack_mask(mask)).repeat(self.batch, 1).to(self.device),
            torch.tensor(depths * self.batch, **fixed),
            self.rows,
        )

    @cached_property
    def chain(self) -> TreeBatch:
        return self._batch(range(self.rows - 1))

    @cached_property
    def tree(self) -> TreeBatch:
        return self._batch([random.randrange(r) for r in range(1, self.rows)])

    def run(self, kernel: Any, batch: TreeBatch, cache: torch.Tensor) -> torch.Tensor:
        keys, values = cache.split(self.head_size, dim=-1)
        scale = self.head_size**-0.5
        kernel(self.query, keys, values, self.output, batch, scale)
        return self.output

    def flash(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """vLLM's own call on a chain; the reference where there is no GPU."""
        if self.device.type != "cuda":
            return partial(self.run, tree_attention_reference, self.chain)
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        version = get_flash_attn_version(head_size=self.head_size)
        lengths = torch.full_like(self.starts[:-1], self.context + self.rows)

        def run(cache: torch.Tensor) -> torch.Tensor:
            keys, values = cache.transpose(1, 2).split(self.head_size, dim=-1)
            flash_attn_varlen_func(
                q=self.query,
                k=keys,
                v=values,
                out=self.output,
                cu_seqlens_q=self.starts,
                max_seqlen_q=self.rows,
                seqused_k=lengths,
                max_seqlen_k=self.context + self.rows,
                softmax_scale=self.head_size**-0.5,
                causal=True,
                block_table=self.table,
                fa_version=version,
            )
            return self.output

        return run


def measure_attention(work: Attention, repeats: int) -> dict[str, Any]:
    """Both kernels' times in microseconds per layer, and how far they differ."""
    from vllm_ppd.kernels.triton.tree_attention import tree_attention

    flash, cache = work.flash(), work.caches[0]
    expected = flash(cache).float().clone()
    ours = work.run(tree_attention, work.chain, cache).float()
    calls = [partial(work.run, tree_attention, work.tree, c) for c in work.caches]
    tree = Spread.of(microseconds(calls, work.device, repeats))
    flashes = [partial(flash, c) for c in work.caches]
    flashed = Spread.of(microseconds(flashes, work.device, repeats))
    return {
        "kernel": "attention",
        **work.about,
        "tree_us": tree.to_dict(2),
        "flash_us": flashed.to_dict(2),
        "ratio": round(tree.median / flashed.median, 3),
        # Of what has to be read at least; compare with the GPU's memory.
        "tree_gb_per_s": round(work.layer_bytes / tree.median / 1e3, 1),
        "largest_difference": float((ours - expected).abs().max()),
    }


def step_calls(
    shape: str, batch: int, rows: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """What a step of `batch` trees runs; the deepest path of each is accepted."""
    from vllm_ppd.kernels.triton.fill_tree import DeviceDraftInputs, fill_tree
    from vllm_ppd.kernels.triton.kv_compact import KVCompactor
    from vllm_ppd.kernels.triton.place_tree import place_tree
    from vllm_ppd.kernels.triton.tree_walk import tree_walk

    _, _, layers, _, kv_heads, head_size, _ = SHAPES[shape]
    # The paper's Vicuna-7B; its largest trees are three deep.
    model = AcceptanceModel.of(load_table(TABLE))
    policy = best_policy(model, LatencyCurve.constant(), rows).entry().policies[0]
    tables = DeviceTables.on(device, TreeTables(policy, VOCABULARY))
    tree = policy.trees[3]
    rows = tree.num_rows
    tokens = batch * rows

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = ints(*range(0, tokens + 1, rows))
    trees, counts = ints(*[3] * batch), ints(*[rows] * batch)
    # Nodes carry distinct tokens; the target takes the path to the last deepest node.
    ids = torch.arange(tokens, dtype=torch.int32, device=device)
    picked = torch.full_like(ids, -1)
    depth = max(tree.node_depths)
    child = len(tree.node_depths) - 1 - tree.node_depths[::-1].index(depth)
    while child:
        parent = tree.parents[child - 1]
        picked[parent::rows] = ids[child::rows]
        child = parent
    picked = picked.long()
    size = 16
    space = -(-tokens // size) + 1, size, kv_heads, 2 * head_size
    compactor = KVCompactor(
        [
            torch.zeros(space, dtype=torch.bfloat16, device=device).transpose(1, 2)
            for _ in range(layers)
        ]
    )
    slots = torch.arange(tokens, device=device) + size
    logits = torch.randn(batch, 3, VOCABULARY, dtype=torch.bfloat16, device=device)
    scores, pool = logits.topk(max(POOL, tables.parents.shape[1]))
    ngrams = ints(-1).expand(batch, 1).contiguous()
    inputs = DeviceDraftInputs(trees, logits, pool, scores, trees, ngrams)
    listed = torch.randint(VOCABULARY, (VOCABULARY, 32), device=device)
    gains = torch.randn(VOCABULARY, 32, device=device)
    bigram = BigramTensors(listed, gains, gains[:, 0].contiguous())
    weights = torch.ones(3, device=device)
    drafts = torch.zeros(batch, rows - 1, dtype=torch.int64, device=device)
    positions = torch.arange(tokens, device=device)
    words = tables.ancestors.shape[2]
    ancestors = torch.zeros(tokens, words, dtype=torch.int64, device=device)
    depths = torch.zeros(tokens, dtype=torch.int32, device=device)
    out = torch.zeros(2, batch, dtype=torch.int32, device=device)
    layout = starts, counts + 1000, positions, ancestors, depths, *out

    def walk() -> Any:
        return tree_walk(tables, trees, starts[:-1], counts, ids, picked, starts[:-1])

    def compact(walked: Any) -> None:
        compactor.run(slots, starts[:-1], walked.paths, walked.num_sampled)

    walked = walk()
    assert walked.num_sampled.eq(1 + depth).all(), "every walk goes down all the way"
    return {
        "walk": walk,
        "compact": partial(compact, walked),
        "walk and compact": lambda: compact(walk()),
        "fill": lambda: fill_tree(tables, trees, inputs, bigram, weights, drafts),
        "place": lambda: place_tree(tables, trees, counts, *layout),
    }


def measure_step(
    shape: str, batch: int, rows: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Microseconds of each kernel beside the forward pass."""
    figures = {
        name: Spread.of(microseconds([call] * 16, device, repeats)).to_dict(2)
        for name, call in step_calls(shape, batch, rows, device).items()
    }
    return {
        "kernel": "step",
        "shape": shape,
        "batch": batch,
        "rows": rows,
        "us": figures,
    }


def show(cell: dict[str, Any]) -> None:
    """One line, with medians for spreads."""
    shown = {k: v["median"] if "median" in str(v)[:9] else v for k, v in cell.items()}
    if "us" in cell:
        shown["us"] = {name: us["median"] for name, us in cell["us"].items()}
    print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    kernels = ["attention", "step"]
    add("--kernels", nargs="+", choices=kernels, default=kernels, help="what is timed")
    add("--shapes", nargs="+", choices=SHAPES, default=["7b", "8b"], help="models")
    add("--rows", nargs="+", type=int, default=[1, 16, 32, 64, 128])
    add("--contexts", nargs="+", type=int, default=[1024, 4096, 16384])
    add("--batches", nargs="+", type=int, default=[1, 8, 64], help="requests")
    add("--block-size", type=int, default=16, help="slots per block")
    add("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of all")
    add("--repeats", type=int, default=20, help="timings per cell")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.shapes, args.rows, args.contexts = ["tiny"], [12], [20]
        args.batches, args.repeats = [2], 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = choose_device(args.dry_run)
    torch.manual_seed(0)
    random.seed(0)
    cells: list[dict[str, Any]] = []

    def take(cell: dict[str, Any]) -> None:
        cells.append(cell)
        show(cell)

    pairs = [(s, b, r) for s in args.shapes for b in args.batches for r in args.rows]
    for shape, batch, rows in pairs:
        for context in args.contexts if "attention" in args.kernels else ():
            dtype = getattr(torch, args.dtype)
            place = args.block_size, dtype, device
            work = Attention(shape, batch, rows, context, *place)
            take(measure_attention(work, args.repeats))
        if "step" in args.kernels and rows >= 8:
            take(measure_step(shape, batch, rows, device, args.repeats))
    card = environment_card()
    finish(results_document("gpu_kernels", card, vars(args), cells), args.out)
    wrong = [c for c in cells if c.get("largest_difference", 0) > TOLERANCE]
    if wrong:
        raise SystemExit(
            f"{len(wrong)} of {len(cells)} cells are wrong: their largest_difference "
            f"is above {TOLERANCE}"
        )


if __name__ == "__main__":
    main()
