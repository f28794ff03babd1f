"""Which tile sizes suit tree attention: the choices in tree_attention.py, measured.

Every shape of the work (rows of a tile, slots of a tile, warps, pipeline stages, and
how often the context is split relative to the usual) against FlashAttention, at 64
rows. Run it on a new kind of GPU, or after a change of the kernel.

    python benchmarks/gpu_tile_sweep.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_tile_sweep.py --dry-run    # tiny, on a CPU, interpreted

The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_timing import choose_device, finish, microseconds
from gpu_tree_attention import (
    SHAPES,
    TOLERANCE,
    Cell,
    Step,
    on_a_chain,
    run_reference,
    run_tree,
)

ROWS = 64
# model, batch, context
CELLS = [("8b", 1, 4096), ("8b", 1, 16384), ("8b", 16, 4096), ("7b", 16, 4096)]
# rows, slots, warps, stages, splits; None: what tree_attention chooses.
CHOICES: list[tuple[int, int, int, int, int] | None] = [
    None,
    *((64, slots, 4, stages, 1) for slots in (32, 64, 128) for stages in (2, 3)),
    *((128, slots, 8, 3, splits) for slots in (64, 128) for splits in (1, 2)),
    (64, 64, 4, 3, 2),
]


def sweep(step: Step, choices: list[Any], repeats: int) -> list[dict[str, Any]]:
    """Microseconds per layer of every choice."""
    import vllm_ppd.kernels.triton.tree_attention as module

    stock = module._choose_shape
    expected = run_reference(step, step.caches[0], step.tree).clone()
    found = []
    for choice in choices:
        used: list[Any] = []

        def choose(requests: int, *args: Any, choice=choice, used=used) -> Any:
            shape = stock(requests, *args)
            if choice is not None:
                rows, slots, warps, stages, splits = choice
                tiles = -(-args[0] * args[2] // rows)
                wanted = splits * 2 * multiprocessors() // (requests * tiles * args[1])
                shape = shape._replace(
                    block_m=rows,
                    row_tiles=tiles,
                    tile=slots,
                    num_warps=warps,
                    num_stages=stages,
                    splits=1 << max(0, min(wanted, 32).bit_length() - 1),
                )
            used.append(shape)
            return shape

        module._choose_shape = choose  # type: ignore[assignment]
        try:
            calls = [partial(run_tree, step, c, step.tree) for c in step.caches]
            times = microseconds(calls, step.query.device, repeats)
            # A fast kernel that is wrong is no choice.
            difference = (calls[0]() - expected).abs().max().item()
            if difference > TOLERANCE:
                raise ValueError(f"wrong by {difference:.2g}")
            found.append({"us": round(median(times), 1), "shape": used[-1]._asdict()})
        except Exception as error:  # or more shared memory than there is
            found.append({"us": None, "shape": used[-1]._asdict(), "why": str(error)})
        finally:
            module._choose_shape = stock
    return found


def multiprocessors() -> int:
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(0).multi_processor_count


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="timings per cell")
    parser.add_argument("--out", type=Path, help="write the JSON document here, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes; also without a GPU"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = choose_device(args.dry_run)
    wanted, choices = CELLS, CHOICES
    if args.dry_run:
        wanted, choices = [("tiny", 1, 40)], CHOICES[:3]
        args.repeats = 2
    torch.manual_seed(0)
    random.seed(0)
    cells = []
    for name, batch, context in wanted:
        heads, kv_heads, size = (4, 2, 16) if name == "tiny" else SHAPES[name]
        rows = 5 if args.dry_run else ROWS
        cell = Cell(name, heads, kv_heads, size, batch, rows, context)
        step = Step(cell, 16, torch.bfloat16, device)
        flash = on_a_chain(step)
        calls = [partial(flash, cache) for cache in step.caches]
        flashed = median(microseconds(calls, device, args.repeats))
        print(f"{name} batch {batch} context {context}: flash {flashed:.1f} us")
        tried = sweep(step, choices, args.repeats)
        for one in tried:
            shape = [one["shape"][key] for key in ("block_m", "tile", "num_warps")]
            shape += [one["shape"][key] for key in ("num_stages", "splits")]
            shown = "failed" if one["us"] is None else f"{one['us']:8.1f} us"
            print(f"  {shown}  rows, slots, warps, stages, splits {shape}", flush=True)
        cells.append(
            {
                "shape": name,
                "batch": batch,
                "rows": rows,
                "context": context,
                "flash_us": round(flashed, 1),
                "tree": tried,
            }
        )
    finish("ppd_gpu_tile_sweep", args, device, cells=cells)


if __name__ == "__main__":
    main()
