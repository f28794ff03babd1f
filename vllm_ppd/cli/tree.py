"""`vllm-ppd tree`: the tree menu of a prompt-token folder, and drawings of trees."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from vllm_ppd.config import PPDConfig
from vllm_ppd.hub import resolve_path
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE
from vllm_ppd.search.latency import LatencyProfile, expected_speedup
from vllm_ppd.search.menu_search import acceptance_for, menu_for
from vllm_ppd.search.policy_iteration import TreeFigures, entry_figures
from vllm_ppd.trees.menu import MenuEntry, TreeMenu

# Numbers of running requests for which speeds are shown.
_LOADS = (1, 4, 16, 64)
# So many sibling leaves share a line.
_RUN = 3
_LEGEND = """\
[dim]#1 is the likeliest draft token after its parent, #2 the next one, and so on.
30% is the probability that verification accepts the token.
+2 is the number of prompt rows after it.[/]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "Folder or hub id of prompt tokens (default: the trees without any)."
    add("path", nargs="?", help=text)
    text = "Kind of machine to show the menu for (default: cuda if there is a GPU)."
    add("--device", choices=("cpu", "cuda"), help=text)
    text = "Latency profile of a machine, as vllm-ppd profile writes it: also show the "
    add("--profile", metavar="FILE", help=f"{text}expected speed.")
    text = "Upper limit of draft tokens and prompt rows per request and step, as "
    text += "num_speculative_tokens in vllm serve (default: 15 on CPU, 63 on CUDA)."
    add("--max-draft-tokens", type=int, metavar="N", help=text)
    add("--tree", metavar="FILE", help="Show the tree menu of this file instead.")
    text = "Draft length whose tree is drawn (default: the fastest for one request "
    text += "with --profile, else one from the middle of the menu)."
    add("--draw", type=int, metavar="LENGTH", help=text)
    text = "As if n-gram drafts were switched off."
    add("--no-ngram", action="store_true", help=text)
    text = "As if the bigram table were switched off."
    add("--no-bigram", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Exit status 0. Raises ValueError subclasses for unusable input."""
    # Here, because torch takes a second to import.
    import torch

    from vllm_ppd.prompt_tokens.tokens import PromptTokens

    config = PPDConfig(
        args.path, args.max_draft_tokens, args.tree, args.profile or "none"
    )
    folder, m, num_ept = None, 0, 1
    if args.path is not None:
        folder = resolve_path(args.path)
        m, num_ept, _ = PromptTokens.load(folder).embeddings.shape
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = None if args.profile is None else LatencyProfile.load(args.profile)
    bigram, ngram = not args.no_bigram, not args.no_ngram
    menu = menu_for(
        folder,
        m,
        num_ept,
        bigram=bigram,
        ngram=ngram,
        max_rows=config.max_rows(device, num_ept),
        # vLLM's V2 runner, which serves on CUDA, gives all requests as many rows.
        fixed_rows=device == "cuda",
        tree_file=args.tree,
    )
    ngram = ngram and menu.num_classes > 1
    model = acceptance_for(folder, m, bigram=bigram, ngram=ngram)
    entry = _entry_to_draw(menu, args.draw, profile)
    console = Console(highlight=False)
    console.print(_facts(args, folder, menu, device, profile), "")
    console.print(menu_table(menu, profile), "")
    figures = entry_figures(entry, model)
    # Without an n-gram match, and with the longest one.
    for match_class in sorted({0, menu.num_classes - 1}):
        main = max(
            (tree for tree in figures if tree.match_class == match_class),
            key=lambda tree: tree.share * (tree.acceptance_length - 1),
        )
        console.print(f"{_title(entry, main, menu.num_classes > 1)}\n")
        console.print(text_tree(main), "")
    console.print(_LEGEND.strip())
    return 0


def _entry_to_draw(
    menu: TreeMenu, draft_length: int | None, profile: LatencyProfile | None
) -> MenuEntry:
    if draft_length is not None:
        if draft_length not in menu.draft_lengths:
            raise ValueError(
                f"--draw is {draft_length}; expected a draft length of the menu: "
                f"{', '.join(map(str, menu.draft_lengths))}"
            )
        return menu.entries[menu.draft_lengths.index(draft_length)]
    if profile is not None:
        curve = profile.curve(1)
        speeds = [expected_speedup(entry, curve) or 0.0 for entry in menu.entries]
        return menu.entries[int(np.argmax(speeds))]
    return menu.entries[len(menu.entries) // 2]


def _facts(
    args: argparse.Namespace,
    folder: Path | None,
    menu: TreeMenu,
    device: str,
    profile: LatencyProfile | None,
) -> Table:
    from vllm_ppd.trees.bigram import BIGRAM_FILE

    def has(name: str) -> bool:
        return folder is not None and (folder / name).exists()

    sources = []
    if folder is not None:
        sources.append(_counted(menu.num_prompt_tokens, "prompt token"))
    if menu.num_ept > 1:
        sources[0] += f" of {menu.num_ept} EPT"
    if not args.no_bigram:
        learnt = "" if has(BIGRAM_FILE) else " (learnt while serving)"
        sources.append(f"bigram table{learnt}")
    if menu.num_classes > 1:
        sources.append("n-gram matches")
    acceptance = "typical values; vllm-ppd calibrate measures them"
    if has(ACCEPTANCE_FILE):
        acceptance = f"measured ({ACCEPTANCE_FILE})"
    machine = f"{device.upper()}; add --profile FILE for expected speeds"
    if profile is not None:
        machine = str(profile.key.get("device", device.upper()))
    rows = {
        "prompt tokens": args.path or "none",
        "draft tokens from": ", ".join(sources),
        "acceptance": acceptance,
        "machine": machine,
    }
    if args.tree:
        rows["tree menu"] = args.tree
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    for name, value in rows.items():
        facts.add_row(f"[dim]{name}[/]", escape(value))
    return facts


def menu_table(menu: TreeMenu, profile: LatencyProfile | None) -> Table:
    """One row per entry; with a profile, one column of speeds per load."""
    loads = _LOADS if profile is not None else ()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    heads = ["draft\nlength", "rows\nper step", "acceptance\nlength"]
    for head in (*heads, *(f"speed at\n{n} request{'s' * (n > 1)}" for n in loads)):
        table.add_column(head, justify="right", vertical="bottom")
    curves = [] if profile is None else [profile.curve(n) for n in loads]
    speeds = [[expected_speedup(e, curve) for curve in curves] for e in menu.entries]
    columns = zip(*speeds, strict=True)
    best = [max((s for s in column if s), default=0.0) for column in columns]
    plain = ["0 (plain)", "1.0", "1.00", *("1.00x" for _ in loads)]
    table.add_row(*plain, style="dim")
    for entry, row in zip(menu.entries, speeds, strict=True):
        length = entry.acceptance_length
        rows = sum(count * share for count, share in entry.row_shares)
        cells = [
            str(entry.num_draft_tokens),
            f"{rows:.1f}" if rows else "?",
            "?" if length is None else f"{length:.2f}",
        ]
        for speed, fastest in zip(row, best, strict=True):
            text = "?" if speed is None else f"{speed:.2f}x"
            is_best = speed is not None and speed == fastest > 1
            cells.append(f"[bold green]{text}[/]" if is_best else text)
        table.add_row(*cells)
    return table


def _title(entry: MenuEntry, figures: TreeFigures, has_matches: bool) -> str:
    tree, where = figures.tree, ""
    if has_matches:
        where = f" {'with' if figures.match_class else 'without'} an n-gram match"
    prompts = _counted(tree.num_rows - tree.num_nodes, "prompt row")
    return (
        f"Draft length {entry.num_draft_tokens}, {figures.share:.0%} of its steps"
        f"{where}:\n{_counted(tree.num_nodes - 1, 'draft token')}, {prompts}, "
        f"acceptance length {figures.acceptance_length:.2f}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def text_tree(figures: TreeFigures) -> Tree:
    """A tree as text: a line per node, or per run of sibling leaves.

    With an n-gram match, rank 0 below the root, and below each such node, is the n-gram
    draft's token.
    """
    tree, reached = figures.tree, figures.reached
    on_ngram = [figures.match_class > 0 and on_path for on_path in tree.ngram_path]
    children: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for node, parent in enumerate(tree.parents, start=1):
        children[parent].append(node)

    def kind(node: int) -> tuple[int, bool, int]:
        # Nodes with children are told apart by their number.
        return node if children[node] else 0, on_ngram[node], tree.prompts[node]

    def label(nodes: Sequence[int]) -> str:
        first, last = nodes[0], nodes[-1]
        prompts = f" [cyan]+{tree.prompts[first]}[/]" if tree.prompts[first] else ""
        if first == 0:
            return f"[bold]root[/]{prompts}"
        likely, unlikely = (f"{max(reached[n], 0):.0%}" for n in (first, last))
        percent = likely if likely == unlikely else f"{likely} to {unlikely}"
        if on_ngram[first]:
            return f"[magenta]n-gram[/] {percent}{prompts}"
        parent = tree.parents[first - 1]
        # Below an n-gram draft, rank 0 is its token and the others count from 1.
        places = [tree.ranks[n - 1] + (not on_ngram[parent]) for n in nodes]
        name = f"#{places[0]}"
        if len(nodes) > 1:
            gaps = places[-1] - places[0] >= len(nodes)
            name = f"{len(nodes)} of " * gaps + f"{name} to #{places[-1]}"
        return f"[green]{name}[/] {percent}{prompts}"

    def grow(branch: Tree, node: int) -> None:
        below = sorted(children[node], key=lambda child: tree.ranks[child - 1])
        for _, group in groupby(below, key=kind):
            nodes = list(group)
            runs = [nodes] if len(nodes) >= _RUN else [[each] for each in nodes]
            for run_of_leaves in runs:
                grow(branch.add(label(run_of_leaves)), run_of_leaves[0])

    drawn = Tree(label([0]), guide_style="dim")
    grow(drawn, 0)
    return drawn
