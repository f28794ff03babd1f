"""What PPD adds to a step after the forward pass, kernel by kernel.

The walk along the sampled tokens, the KV compaction in all layers, and before the next
step the guesses and the tree layout. The times are those of the GPU, within a CUDA
graph; the walk and the compaction together should stay below 30 microseconds.

    python benchmarks/gpu_verify.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_verify.py --dry-run    # tiny, on a CPU, interpreted

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import choose_device, finish, microseconds
from stats import Spread

from vllm_ppd.kernels.fill_tree import DeviceDraftInputs
from vllm_ppd.kernels.device_tables import DeviceTables
from vllm_ppd.trees.drafting import POOL, BigramTensors
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.tree import SparseTree, TreePolicy, chain_tree

VOCABULARY = 32000
# (layers, KV heads, head size)
SHAPES = {"1b": (16, 8, 64), "7b": (32, 32, 128), "8b": (32, 8, 128)}


def bushy_policy(rows: int) -> TreePolicy:
    """State 3's tree has `rows` rows, a prompt token on each node, and is 3 deep."""
    nodes = max(4, rows // 2)
    parents, ranks, depths = [0, 1, 2], [0, 0, 0], [0, 1, 2, 3]
    children = [1, 1, 1, 0]
    for node in range(4, nodes):
        parent = min(range(node), key=lambda n: (depths[n] > 2, children[n], n))
        parents.append(parent)
        ranks.append(children[parent])
        children[parent] += 1
        depths.append(depths[parent] + 1)
        children.append(0)
    tree = SparseTree(tuple(parents), tuple(ranks), (1,) * nodes)
    chains = [chain_tree(state, [1] * (state + 1)) for state in (1, 2)]
    return TreePolicy((chain_tree(0, [3]), *chains, tree))


def kernel_calls(
    shape: tuple[int, int, int], batch: int, rows: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """What a step of `batch` trees runs; three tokens of every tree are accepted."""
    from vllm_ppd.kernels.triton.fill_tree import fill_tree
    from vllm_ppd.kernels.triton.kv_compact import KVCompactor
    from vllm_ppd.kernels.triton.place_tree import place_tree
    from vllm_ppd.kernels.triton.tree_walk import tree_walk

    layers, kv_heads, head_size = shape
    policy = bushy_policy(rows)
    tables = DeviceTables.on(device, TreeTables(policy, VOCABULARY))
    rows = policy.trees[3].num_rows
    tokens = batch * rows

    def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    starts = ints(*range(0, tokens + 1, rows))
    trees, counts = ints(*[3] * batch), ints(*[rows] * batch)
    # Nodes carry distinct tokens; the target takes the path to the last deep node.
    ids = torch.arange(tokens, dtype=torch.int32, device=device)
    picked = torch.full_like(ids, -1)
    tree = policy.trees[3]
    child = max(node for node, depth in enumerate(tree.node_depths) if depth == 3)
    while child:
        parent = tree.parents[child - 1]
        picked[parent::rows] = ids[child::rows]
        child = parent
    picked = picked.long()
    walk = tree_walk(tables, trees, starts[:-1], counts, ids, picked, starts[:-1])
    size = 16
    blocks = -(-tokens // size) + 1
    caches = [
        torch.zeros(
            blocks, size, kv_heads, 2 * head_size, dtype=torch.bfloat16, device=device
        ).transpose(1, 2)
        for _ in range(layers)
    ]
    compactor = KVCompactor(caches)
    slots = torch.arange(tokens, device=device) + size
    logits = torch.randn(batch, 3, VOCABULARY, dtype=torch.bfloat16, device=device)
    scores, pool = logits.topk(max(POOL, tables.parents.shape[1]))
    chains = ints(-1).expand(batch, 1).contiguous()
    guesses = DeviceDraftInputs(ints(*[3] * batch), logits, pool, scores, trees, chains)
    listed = torch.randint(VOCABULARY, (VOCABULARY, 32), device=device)
    gains = torch.randn(VOCABULARY, 32, device=device)
    table = BigramTensors(listed, gains, gains[:, 0].contiguous())
    weights = torch.ones(3, device=device)
    drafts = torch.zeros(batch, rows - 1, dtype=torch.int64, device=device)
    positions = torch.arange(tokens, device=device)
    ancestors = torch.zeros(
        tokens, tables.ancestors.shape[2], dtype=torch.int64, device=device
    )
    depths = torch.zeros(tokens, dtype=torch.int32, device=device)
    out = torch.zeros(2, batch, dtype=torch.int32, device=device)
    lengths = counts + 1000
    assert walk.num_sampled.eq(4).all(), "every walk goes down to depth 3"

    def walk_again() -> Any:
        return tree_walk(tables, trees, starts[:-1], counts, ids, picked, starts[:-1])

    def compact() -> None:
        compactor.run(slots, starts[:-1], walk.paths, walk.num_sampled)

    def both() -> None:
        again = walk_again()
        compactor.run(slots, starts[:-1], again.paths, again.num_sampled)

    def guess() -> None:
        fill_tree(tables, trees, guesses, table, weights, drafts)

    def place() -> None:
        place_tree(
            tables, trees, counts, starts, lengths, positions, ancestors, depths, *out
        )

    return {
        "walk": walk_again,
        "compact": compact,
        "walk and compact": both,
        "guess": guess,
        "place": place,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["7b", "8b"], help="models"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
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
        shapes = {"tiny": (2, 2, 16)}
        args.rows, args.batches, args.repeats = [12], [2], 2
    torch.manual_seed(0)
    cells = []
    for name, shape in shapes.items():
        for batch in args.batches:
            for rows in args.rows:
                figures = {}
                for kernel, call in kernel_calls(shape, batch, rows, device).items():
                    times = microseconds([call] * 16, device, args.repeats)
                    figures[kernel] = Spread.of(times).to_dict(2)
                cells.append(
                    {"shape": name, "batch": batch, "rows": rows, "us": figures}
                )
                shown = ", ".join(
                    f"{kernel} {found['median']:.1f}"
                    for kernel, found in figures.items()
                )
                print(f"{name} batch {batch} rows {rows}, us: {shown}", flush=True)
    finish("ppd_gpu_verify", args, device, cells=cells)


if __name__ == "__main__":
    main()
