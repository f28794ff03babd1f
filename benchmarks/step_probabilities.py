"""Would trees that each step chooses by its own probabilities guess better?

    python benchmarks/step_probabilities.py --dry-run
    python benchmarks/step_probabilities.py --out benchmarks/results/NAME.json

What is served has one tree per state: its nodes are those with the best chances in the
mean, by depth and rank. A step knows more: how sure its prompt rows are this time. Here
each step of held-out text takes the N likeliest nodes by three estimates of the chance
that a child is right under its parent:

- mean: by depth and rank alone, one tree for all steps (what is served);
- own: the child's share of the scores by which siblings are ranked;
- corrected: how often children of that depth, rank and share were right.

Children come from prompt rows and the bigram table, all prompt rows are at hand in
every step, and steps follow each other as in decoding. Means and corrections are
learnt from one half of the text and used on the other. Earlier matches are left out.
The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import ROOT, environment_card, shown_path
from harness import document
from step_points import RANKS, Point, Points, Ranker
from step_starts import step_starts

from vllm_ppd.calibrate.measure import measure
from vllm_ppd.calibrate.reliability import EDGES
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.calibrate.step_points import accepted_guesses
from vllm_ppd.files import write_json
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.train.data import TokenStream, load_tokenizer, read_stream
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.trees.bigram import BIGRAM_FILE, BigramTable

NODES = (4, 8, 16, 32, 64)
# Ranks from which on candidates are alike.
RANK_EDGES = (1, 2, 4, 8, 16)
# A bin's own share of what it shows, in candidates of its depth and rank.
DOUBT = 50.0

# [ranks] chances of siblings, from their depth (from 0) and shares.
Estimate = Callable[[int, np.ndarray], np.ndarray]


class Learnt:
    """How often children were right, by depth and rank, and by their share too."""

    def __init__(self, m: int, ranker: Ranker):
        self._ranker = ranker
        self._hits = np.zeros((m, RANKS))
        self._tries = np.zeros(m)
        bins = m, len(RANK_EDGES) + 1, len(EDGES) + 1
        self._bin_hits, self._bin_tries = np.zeros(bins), np.zeros(bins)

    def take(self, run: list[Point]) -> None:
        """Count a run, each point by how often a step begins there."""
        m = len(self._tries)
        places = np.full((len(run), m), RANKS)
        shares = np.zeros((len(run), m, RANKS))
        for index, point in enumerate(run):
            for depth in range(m):
                found = self._ranker.children(point, depth, int(point.parents[depth]))
                shares[index, depth, : len(found.ids)] = found.shares
                same = np.flatnonzero(found.ids == point.truth[depth])
                if len(same):
                    places[index, depth] = same[0]
        starts = step_starts(accepted_guesses(places) + 1)
        ranks = np.searchsorted(RANK_EDGES, np.arange(RANKS), side="right")
        for depth in range(m):
            place = places[:, depth]
            inside = place < RANKS
            np.add.at(self._hits[depth], place[inside], starts[inside])
            self._tries[depth] += starts.sum()
            bins = np.searchsorted(EDGES, shares[:, depth])
            weight = np.broadcast_to(starts[:, None], bins.shape)
            where = np.broadcast_to(ranks, bins.shape)
            np.add.at(self._bin_tries[depth], (where, bins), weight)
            at = np.flatnonzero(inside)
            hit = ranks[place[at]], bins[at, place[at]]
            np.add.at(self._bin_hits[depth], hit, starts[at])

    def estimates(self) -> dict[str, Estimate]:
        mean = self._hits / self._tries[:, None]
        ranks = np.searchsorted(RANK_EDGES, np.arange(RANKS), side="right")
        hits, tries = self._bin_hits, self._bin_tries
        usual = hits.sum(2, keepdims=True) / np.maximum(tries.sum(2, keepdims=True), 1)
        corrected = (hits + DOUBT * usual) / (tries + DOUBT)

        def by_bin(depth: int, shares: np.ndarray) -> np.ndarray:
            bins = np.searchsorted(EDGES, shares)
            return corrected[depth, ranks[: len(shares)], bins]

        return {
            "mean": lambda depth, shares: mean[depth, : len(shares)],
            "own": lambda depth, shares: shares,
            "corrected": by_bin,
        }


def places_of_truth(point: Point, ranker: Ranker, estimate: Estimate) -> np.ndarray:
    """[m] how many nodes a tree needs until it holds the true token of each depth, if
    nodes are taken by falling chance to be reached."""
    m = len(point.truth)
    places = np.full(m, NODES[-1] + 1)
    # (-chance, number, chance of the parent, depth, place among siblings, siblings,
    # their chances, whether the parent is true)
    heap: list[tuple[Any, ...]] = []
    numbers = iter(range(1 << 30))

    def offer(reached: float, depth: int, at: int, siblings: Any, true: bool) -> None:
        ids, chances = siblings
        if at < len(ids):
            chance = -reached * float(chances[at])
            entry = reached, depth, at, siblings, true
            heapq.heappush(heap, (chance, next(numbers), *entry))

    def below(reached: float, depth: int, parent: int, true: bool) -> None:
        found = ranker.children(point, depth, parent)
        chances = np.minimum(estimate(depth, found.shares), 1.0)
        order = np.argsort(-chances, kind="stable")
        offer(reached, depth, 0, (found.ids[order], chances[order]), true)

    below(1.0, 0, int(point.parents[0]), True)
    for taken in range(1, NODES[-1] + 1):
        if not heap:
            break
        chance, _, reached, depth, at, siblings, true = heapq.heappop(heap)
        token = int(siblings[0][at])
        right = true and token == point.truth[depth]
        if right:
            places[depth] = taken
        offer(reached, depth, at + 1, siblings, true)
        if depth + 1 < m:
            below(-chance, depth + 1, token, right)
    return places


class Replay:
    """Steps through runs with trees of each size, by each estimate."""

    def __init__(self, ranker: Ranker, estimates: dict[str, Estimate]):
        self._ranker, self._estimates = ranker, estimates
        # By estimate and size: steps and tokens of each run.
        self.runs: dict[str, dict[int, list[tuple[int, int]]]] = {
            name: {size: [] for size in NODES} for name in estimates
        }

    def take(self, run: list[Point]) -> None:
        for name, estimate in self._estimates.items():
            places = [places_of_truth(p, self._ranker, estimate) for p in run]
            for size in NODES:
                at = steps = 0
                while at < len(run):
                    at += 1 + int((places[at] <= size).cumprod().sum())
                    steps += 1
                self.runs[name][size].append((steps, at))

    def tokens_per_step(self) -> dict[str, dict[str, dict[str, float]]]:
        """With half a 95 % interval, from the differences between texts."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, sizes in self.runs.items():
            found[name] = {}
            for size, runs in sizes.items():
                steps, tokens = np.array(runs, dtype=float).T
                tau = tokens.sum() / steps.sum()
                spread = np.sqrt(np.square(tokens - tau * steps).sum()) / steps.sum()
                found[name][str(size)] = {
                    "tokens_per_step": round(float(tau), 4),
                    "half_width_95": round(1.96 * float(spread), 4),
                }
        return found


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / "demo_model" / "model"), help="folder")
    prompts = ROOT / "trained_prompts" / "demo"
    add("--prompts", type=Path, default=prompts, help="calibrated folder")
    text = ROOT / "demo_model" / "held_out.jsonl"
    add("--text", nargs="+", default=[str(text)], help="held-out text")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    add("--points", type=int, default=8000, help="in each half of the text")
    add("--out", type=Path, metavar="FILE", help="where to write the JSON")
    add("--dry-run", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.points, args.temperature = 200, args.temperature[:1]
    if args.points < 1:
        parser.error(f"--points is {args.points}; expected at least 1")
    return args


def compare(
    model: FrozenModel,
    embeddings: torch.Tensor,
    table: BigramTable,
    halves: tuple[TokenStream, TokenStream],
    settings: CalibrationSettings,
) -> dict[str, Any]:
    """Tokens per step by estimate and size, at one temperature."""
    m = embeddings.shape[0]
    ranker = Ranker(table)
    learnt = Learnt(m, ranker)
    counts: Any = Points(m, learnt.take)
    measure(model, embeddings, halves[0], settings, counts=counts)
    replay = Replay(ranker, learnt.estimates())
    counts = Points(m, replay.take)
    measure(model, embeddings, halves[1], settings, counts=counts)
    return replay.tokens_per_step()


def run(args: argparse.Namespace) -> dict[str, Any]:
    prompts = PromptTokens.load(args.prompts)
    usual = CalibrationSettings()
    model = FrozenModel.load(
        args.model,
        dtype=usual.dtype,
        device="cpu",
        max_length=usual.prompt_length + usual.continuation,
    )
    table = BigramTable.load(
        args.prompts / BIGRAM_FILE, model.vocab_size, prompts.num_prompt_tokens
    )
    stream = read_stream(
        args.text,
        load_tokenizer(args.model),
        max_tokens=4_000_000,
        least_tokens=usual.prompt_length,
    )
    halves = stream.split(stream.tokens.numel() // 2)
    cells = []
    for temperature in args.temperature:
        print(f"temperature {temperature:g}", file=sys.stderr, flush=True)
        settings = CalibrationSettings(points=args.points, temperature=temperature)
        found = compare(model, prompts.embeddings, table, halves, settings)
        cells.append({"temperature": temperature, "estimates": found})
    shown = {
        "model": shown_path(args.model),
        "prompts": shown_path(str(args.prompts)),
        "text": [shown_path(file) for file in args.text],
        "points": args.points,
        "ranks": RANKS,
    }
    return document("step_probabilities", environment_card({}), {}, shown, cells)


def table_of(cells: list[dict[str, Any]]) -> str:
    head = [f"{size} candidates" for size in NODES]
    lines = ["| temperature | nodes by | " + " | ".join(head) + " |"]
    lines.append("|---" * (2 + len(NODES)) + "|")
    for cell in cells:
        for name, sizes in cell["estimates"].items():
            figures = [
                f"{sizes[str(size)]['tokens_per_step']:.2f}"
                f" ± {sizes[str(size)]['half_width_95']:.2f}"
                for size in NODES
            ]
            row = " | ".join([f"{cell['temperature']:g}", name, *figures])
            lines.append(f"| {row} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        results = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table_of(results["cells"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
    print(json.dumps(results, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
