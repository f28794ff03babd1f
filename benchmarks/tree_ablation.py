"""What each part of the trees is worth: the search, bigram table, n-gram drafts.

    python benchmarks/tree_ablation.py --predict-only    # no engine
    python benchmarks/tree_ablation.py --dry-run         # does it run at all?
    python benchmarks/tree_ablation.py --out benchmarks/results/tree_ablation.json

Trees of each kind have at most so many rows, root, draft tokens and prompt rows
counted, and take what they can for the largest mean acceptance length:

- ours: the policy iteration that is served (`vllm_ppd/search/policy_iteration.py`);
- paper: the published procedure, which knows of depths and ranks only. For n-gram
  matches it gets the probabilities along the chain, where rank 0 is the n-gram draft;
- chain: the best trees without branches.

Predicted lengths are those of the acceptance model that the trees were made from, and,
for prompt rows alone, of the tables in benchmarks/data. Measured ones are counted
from vLLM's outputs: tokens per decode step and request. One engine per kind and source
of draft tokens serves the trees of all sizes, one after another. Greedy text of a small
model is mostly loops, the best case of n-gram drafts: compare the sampled columns.
"""

from __future__ import annotations

import argparse
import heapq
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from engines import running
from harness import encode_prompts
from published import load_table
from results import (
    ROOT,
    add_model_arguments,
    add_text_arguments,
    environment_card,
    finish,
    markdown,
    numbers,
    parser_of,
    results_document,
    say,
)

from vllm_ppd.cli.engines import EngineFailedError, engine_settings
from vllm_ppd.engine.generation import Generation
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.policy_iteration import (
    best_policy,
    policy_value,
    reach_probabilities,
)
from vllm_ppd.trees.menu import MenuEntry, TreeMenu, save_menus
from vllm_ppd.trees.tree import SparseTree, TreePolicy

KINDS = ("chain", "paper", "ours")
# (bigram table, n-gram drafts)
SOURCES = ((False, False), (True, False), (False, True), (True, True))
_CONSTANT = LatencyCurve.constant()
_MAX_ROUNDS = 10


def paper_trees(model: AcceptanceModel, rows: int, num_ept: int) -> list[SparseTree]:
    """[m + 1] the published dynamic sparse tree within `rows` rows, all counted.

    The root keeps m prompt tokens. The draft tokens of num_prompted s are its likeliest
    paths, each with m prompt tokens at first. Then the prompt token of least loss,
    residual(v) * (f(T_k) - f(T_{k-1})) for the k-th on node v, is removed until the
    tree fits, but one stays on every node, as in the authors' trees. How many draft
    tokens each tree has is found by policy iteration, from several starts, because f,
    the tokens that each tree accepts, decides over the prompt tokens of all trees.

    Args:
        model: acceptance probabilities; only `marginal` is used.
        rows: most rows of a tree.
        num_ept: rows per prompt token.
    """
    model = AcceptanceModel.of(model.marginal)
    m = model.num_prompt_tokens
    orders = [_likeliest_paths(model.marginal[:depth], rows) for depth in range(m + 1)]
    full = [SparseTree(*order, (0,) * (1 + len(order[0]))) for order in orders]
    reached = [reach_probabilities(tree, model, n, 0) for n, tree in enumerate(full)]
    best: tuple[float, list[SparseTree]] = (0.0, [])
    for prompts_each in range(m + 1):
        size = max(0, rows - 1 - num_ept * m) // (1 + num_ept * prompts_each)
        accepted = np.array([chances[1 : 1 + size].sum() for chances in reached])
        values = accepted
        for _ in range(_MAX_ROUNDS):
            trees, tokens, moves = [], [], []
            for order, chances in zip(orders, reached, strict=True):
                options = _pruned_trees(order, chances, accepted, rows, num_ept)
                steps = [_step(tree, chances, m) for tree in options]
                worth = [emitted + after @ values for emitted, after in steps]
                index = int(np.argmax(worth))
                trees.append(options[index])
                tokens.append(steps[index][0])
                moves.append(steps[index][1])
            length = policy_value([trees], model, _CONSTANT)[0]
            if length > best[0]:
                best = length, trees
            if np.array_equal(accepted, np.array(tokens) - 1):
                break
            accepted = np.array(tokens) - 1
            # Least squares, because a chain may have several recurrent classes.
            system = np.eye(m + 1) - np.array(moves)
            values = np.linalg.lstsq(system, np.array(tokens) - length, rcond=None)[0]
    return best[1]


def _likeliest_paths(
    table: np.ndarray, count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parents and ranks of the `count` most probable paths, the likeliest first.

    table: [depths, ranks] acceptance probabilities.
    """
    ranked = np.argsort(-table, axis=1, kind="stable").tolist()
    parents: list[int] = []
    ranks: list[int] = []
    # (minus path probability, tie break, parent, parent's probability, depth, place
    # among its siblings); a node's next sibling and first child follow it.
    heap = [(0.0, 0, 0, 1.0, 0, 0)] if table.size and table[0].any() else []
    while heap and len(parents) < count:
        _, _, parent, above, depth, place = heapq.heappop(heap)
        node = len(parents) + 1
        here = above * table[depth, ranked[depth][place]]
        parents.append(parent)
        ranks.append(ranked[depth][place])
        following = []
        if place + 1 < len(ranked[depth]):
            following.append((parent, above, depth, place + 1))
        if depth + 1 < len(table):
            following.append((node, here, depth + 1, 0))
        for number, (up, reach, level, index) in enumerate(following):
            chance = reach * table[level, ranked[level][index]]
            if chance > 0:
                tie = 2 * node + number
                heapq.heappush(heap, (-chance, tie, up, reach, level, index))
    return tuple(parents), tuple(ranks)


def _residual(tree_parents: Sequence[int], reached: np.ndarray) -> np.ndarray:
    """[nodes] probability that the walk ends at each node."""
    parents = np.array(tree_parents, dtype=int)
    ends = reached[: len(parents) + 1].copy()
    np.subtract.at(ends, parents, reached[1 : len(parents) + 1])
    return np.maximum(ends, 0.0)


def _step(tree: SparseTree, reached: np.ndarray, m: int) -> tuple[float, np.ndarray]:
    """Tokens of a step, and [m + 1] the next step's num_prompted."""
    ends = _residual(tree.parents, reached)
    return (
        float(reached[: tree.num_nodes].sum()),
        np.bincount(tree.prompts, ends, minlength=m + 1),
    )


def _pruned_trees(
    order: tuple[tuple[int, ...], tuple[int, ...]],
    reached: np.ndarray,
    accepted: np.ndarray,
    rows: int,
    num_ept: int,
) -> list[SparseTree]:
    """Trees of the first 0, 1, 2, ... draft tokens, each with the prompts that fit.

    accepted: [m + 1] f of the trees that the prompt tokens lead to.
    """
    parents, ranks = order
    on_root = min(len(accepted) - 1, (rows - 1) // num_ept)
    budget = rows - 1 - num_ept * on_root
    # A prompt token can only go after those behind it on its node, so it goes when
    # the largest loss among them is the least one there is.
    loss = np.maximum.accumulate(np.diff(accepted)[::-1])[::-1]
    loss[0] = np.inf
    trees = []
    for count in range(min(len(parents), budget // (1 + num_ept)) + 1):
        # A tiny floor: where verification never ends, inf * 0 is no number.
        residual = np.maximum(_residual(parents[:count], reached)[1:], 1e-300)
        kept = np.argsort(-(loss[:, None] * residual), axis=None, kind="stable")
        kept = kept[: (budget - count) // num_ept]
        prompts = np.bincount(kept % max(count, 1), minlength=count)[:count]
        shape = parents[:count], ranks[:count], (on_root, *prompts.tolist())
        trees.append(SparseTree(*shape, num_ept))
    return trees


def entry_of(
    kind: str, model: AcceptanceModel, rows: int, num_ept: int = 1
) -> MenuEntry:
    """The trees of a kind within `rows` rows, and what the model expects of them."""
    if kind == "ours":
        return best_policy(model, _CONSTANT, rows, num_ept).entry()
    if kind == "chain":
        first = np.arange(model.prompted.shape[1]) == 0
        only = {"prompted": model.prompted * first, "beside": 0 * model.beside}
        single = replace(model, unprompted=0 * model.unprompted, **only)
        policies = best_policy(single, _CONSTANT, rows, num_ept).trees
    else:
        m, ranks = model.marginal.shape
        policies = []
        for match_class in range(model.num_classes):
            of_depth = partial(model.probabilities, m, match_class)
            table = [of_depth(depth, True)[:ranks] for depth in range(1, m + 1)]
            policies.append(paper_trees(AcceptanceModel.of(table), rows, num_ept))
    length = policy_value(policies, model, _CONSTANT)[0]
    return MenuEntry(tuple(TreePolicy(tuple(trees)) for trees in policies), length)


def acceptance_length(
    requests: Sequence[Generation], max_tokens: int, reach: int
) -> tuple[float, float]:
    """Tokens per decode step, and half its 95 % interval, over requests.

    The first step, which reads the prompt, and steps that the end of a request may have
    cut short are left out. The interval is that of a ratio of means over requests.
    Raises ValueError without steps.

    Args:
        requests: what was generated.
        max_tokens: where each request ends.
        reach: the most tokens that a step can emit.
    """
    counts = []
    for request in requests:
        written = len(request.steps[0].ids)
        tokens = steps = 0
        for step in request.steps[1:]:
            if written + reach > max_tokens:
                break
            size = len(step.ids)
            written, tokens, steps = written + size, tokens + size, steps + 1
        counts.append((tokens, steps))
    total = sum(steps for _, steps in counts)
    if not total:
        raise ValueError("no request made a decode step; raise --max-tokens")
    rate = sum(tokens for tokens, _ in counts) / total
    square = sum((tokens - rate * steps) ** 2 for tokens, steps in counts)
    correction = len(counts) / max(1, len(counts) - 1)
    return rate, 1.96 * math.sqrt(correction * square) / total


def measure(
    engine: Any, entry: MenuEntry, prompts: Sequence[Any], args: argparse.Namespace
) -> dict[str, list[float]]:
    """[acceptance length, half its 95 % interval] by temperature."""
    engine.run("engines:hold", draft_length=entry.num_draft_tokens)
    depths = [tree.depth for policy in entry.policies for tree in policy.trees]
    lengths = {}
    for temperature in args.temperature:
        params = {"temperature": temperature, "ignore_eos": True}
        params["max_tokens"] = args.max_tokens
        batch = engine.generate(prompts, params, at_once=args.batch)
        reach = 1 + max(depths)
        figures = acceptance_length(batch.requests, args.max_tokens, reach)
        lengths[f"{temperature:g}"] = [round(figure, 4) for figure in figures]
    return lengths


def engine_options(args: argparse.Namespace, file: Path, source: Any) -> dict[str, Any]:
    """Arguments of `Engine`: the trees of a file, and nothing that changes them."""
    speculative = {
        "method": "ppd",
        "model": args.prompts,
        "tree": str(file),
        "num_speculative_tokens": max(args.rows) - 1,
        "bigram": source[0],
        "ngram": source[1],
        "profile": "none",
        "online": False,
    }
    length = args.prompt_tokens + args.max_tokens + 1
    # No speed is measured, and eager engines start sooner.
    settings, _ = engine_settings(args.model, args.dtype, True, length)
    settings |= {"max_num_seqs": args.batch, "speculative_config": speculative}
    return {"settings": settings, "in_process": True}


def predict(model: AcceptanceModel, num_ept: int, args: Any, **about: Any) -> Any:
    """A cell for every kind and number of rows, with its menu entry."""
    for kind in args.kinds:
        for rows in args.rows:
            entry = entry_of(kind, model, rows, num_ept)
            assert entry.acceptance_length is not None
            predicted = round(entry.acceptance_length, 4)
            yield {**about, "kind": kind, "rows": rows, "predicted": predicted}, entry


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    folder = Path(args.prompts)
    tokens = PromptTokens.load(folder)
    full = AcceptanceModel.of_folder(folder, tokens.num_prompt_tokens)
    cells: list[dict[str, Any]] = []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = encode_prompts(tokenizer, args.data, args.num_prompts, args.prompt_tokens)
    for bigram, ngram in args.sources:
        model = full if bigram else full.without_bigram()
        model = model if ngram else model.without_ngram()
        about = {"statistics": "own", "bigram": bigram, "ngram": ngram}
        pairs = list(predict(model, tokens.num_ept, args, **about))
        cells += [cell for cell, _ in pairs]
        for kind in () if args.predict_only else args.kinds:
            # A menu has one entry of each draft length: equal trees are measured once.
            entries = {e.num_draft_tokens: e for c, e in pairs if c["kind"] == kind}
            menu = TreeMenu(tuple(entries[length] for length in sorted(entries)))
            with tempfile.TemporaryDirectory() as place:
                file = Path(place) / "trees.json"
                save_menus(file, menu, menu)
                options = engine_options(args, file, (bigram, ngram))
                with running({kind: options}) as engines:
                    measured = {
                        length: measure(engines[kind], entry, prompts, args)
                        for length, entry in entries.items()
                    }
            for cell, entry in pairs:
                if cell["kind"] == kind:
                    cell["measured"] = measured[entry.num_draft_tokens]
    for file in sorted((ROOT / "benchmarks" / "data").glob("*.json")):
        published = AcceptanceModel.of(load_table(file))
        about = {"statistics": file.stem, "bigram": False, "ngram": False}
        cells += [cell for cell, _ in predict(published, 1, args, **about)]
    return cells


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    temperatures = list(next((c["measured"] for c in cells if "measured" in c), {}))
    head = ["acceptance model", "drafts from", "trees", "rows", "predicted"]
    head += ["greedy" if t == "0" else f"temperature {t}" for t in temperatures]
    rows = [head]
    for cell in cells:
        sources = [name for name in ("bigram", "ngram") if cell[name]]
        drafts = " + ".join(["prompt rows", *sources])
        row = [cell["statistics"], drafts, cell["kind"], cell["rows"]]
        row.append(f"{cell['predicted']:.3f}")
        for t in temperatures:
            figures = cell.get("measured", {}).get(t)
            row.append("{:.3f} ± {:.3f}".format(*figures) if figures else "-")
        rows.append(row)
    return markdown(rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add_model_arguments(parser)
    add_text_arguments(parser)
    add("--rows", type=numbers(int), default=[8, 16, 32], help="most of a tree")
    add("--kinds", type=numbers(str), default=list(KINDS), help=",".join(KINDS))
    add("--num-prompts", type=int, default=64)
    add("--batch", type=int, default=16, help="requests at a time")
    add("--predict-only", action="store_true", help="start no engine")
    parser.set_defaults(max_tokens=160)
    args = parser.parse_args(argv)
    args.sources = SOURCES
    if args.dry_run:
        args.rows, args.kinds, args.sources = args.rows[:1], ["paper"], SOURCES[3:]
        args.num_prompts, args.prompt_tokens, args.max_tokens = 4, 16, 24
    for unknown in set(args.kinds) - set(KINDS):
        parser.error(f"--kinds has {unknown!r}; choose from {', '.join(KINDS)}")
    if min(args.rows) < 2 or max(args.rows) > 128:
        parser.error(f"--rows is {args.rows}; expected numbers from 2 to 128")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    card = environment_card()
    try:
        cells = run(args)
    except (ValueError, EngineFailedError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    print(table(cells))
    finish(results_document("tree_ablation", card, vars(args), cells), args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
