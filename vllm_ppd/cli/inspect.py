"""`vllm-ppd inspect`: what a prompt-token folder holds, and whether it fits a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_ppd.files import read_object
from vllm_ppd.hub import resolve_path
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
from vllm_ppd.trees.menu import MENU_FILE, load_menus

TRAINING_FILE = "training.json"

# Accuracies in a training record, and the reference of each.
_ACCURACIES = (
    ("model", "the model's choice"),
    ("greedy", "... on its own path"),
    ("true", "the text"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", help="Folder or hub id of prompt tokens.")
    text = "Folder or hub id of a model: also check that the prompt tokens fit it; "
    add("--model", help=f"{text}the exit status is 1 if they do not.")
    add("--json", action="store_true", help="Print JSON instead of tables.")


def describe(path: str, model: str | None = None) -> dict[str, Any]:
    """Everything that `inspect` shows, as JSON values.

    `problems` has one sentence for each file that cannot be read, and one if the
    prompt tokens do not fit `model`. Raises ValueError if `path` has no readable prompt
    tokens, or if there is no such model.
    """
    # Here, because torch takes a second to import.
    from vllm_ppd.prompt_tokens.peft import is_peft_checkpoint
    from vllm_ppd.prompt_tokens.tokens import FORMAT_VERSION, PromptTokens, tensor_file
    from vllm_ppd.trees.bigram import BIGRAM_FILE

    folder = resolve_path(path)
    prompts = PromptTokens.load(folder)
    problems: list[str] = []

    def record(name: str, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of a file that may be missing, or unreadable."""
        try:
            return read(folder / name) if (folder / name).is_file() else None
        except ValueError as error:
            problems.append(str(error))
            return None

    training = record(
        TRAINING_FILE,
        lambda file: read_object(file, "the training record", "restore or remove it"),
    )
    if training:
        # The last evaluation has an entry of its own.
        training.pop("history", None)
    return {
        "path": path,
        # The authors' layout has no version of its own.
        "format_version": None if is_peft_checkpoint(folder) else FORMAT_VERSION,
        "num_prompt_tokens": prompts.num_prompt_tokens,
        "num_ept": prompts.num_ept,
        "hidden_size": prompts.hidden_size,
        "trainable_parameters": prompts.embeddings.numel(),
        "bytes": tensor_file(folder).stat().st_size,
        "bigram_bytes": record(BIGRAM_FILE, lambda file: file.stat().st_size),
        # One list per prompt token, one norm per EPT.
        "base_model": dataclasses.asdict(prompts.base),
        "training": training,
        "acceptance": record(
            ACCEPTANCE_FILE, lambda file: _acceptance(file, prompts.num_prompt_tokens)
        ),
        "draft_lengths": record(
            MENU_FILE, lambda file: list(load_menus(file)[0].draft_lengths)
        ),
        "fits": _fits(prompts, model, problems) if model else None,
        "problems": problems,
    }


def _fits(prompts: Any, model: str, problems: list[str]) -> dict[str, Any]:
    from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint

    fingerprint = BaseModelFingerprint.of_folder(resolve_path(model), name=model)
    try:
        prompts.check_against(fingerprint)
    except ValueError as error:
        problems.append(str(error))
    return {
        "model": model,
        "fits": not prompts.base.differences(fingerprint),
        "drift": prompts.base.drift(fingerprint),
    }


def _acceptance(path: Path, num_prompt_tokens: int) -> dict[str, Any]:
    table = AcceptanceModel.load(path, num_prompt_tokens).marginal
    sums = table.cumsum(axis=1)
    return {
        "ranks": table.shape[1],
        "top1": sums[:, 0].tolist(),
        "top10": sums[:, min(10, table.shape[1]) - 1].tolist(),
    }


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 if there is a problem, such as a model that differs."""
    description = describe(args.path, args.model)
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        _print(description)
    return 1 if description["problems"] else 0


def _print(description: dict[str, Any]) -> None:
    console = Console(highlight=False)
    facts = Table(title=f"prompt tokens in {description['path']}", show_header=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in (*_facts(description), *_training_facts(description)):
        facts.add_row(name, value)
    console.print(facts)
    scores = (description["training"] or {}).get("held_out")
    if isinstance(scores, dict):
        rows = [
            (label, scores[f"{key}_top1"], scores[f"{key}_top10"])
            for key, label in _ACCURACIES
            if _are_numbers(scores.get(f"{key}_top1"))
            and _are_numbers(scores.get(f"{key}_top10"))
        ]
        console.print(_accuracies("held-out accuracy after training", rows))
    if acceptance := description["acceptance"]:
        rows = [("measured", acceptance["top1"], acceptance["top10"])]
        console.print(_accuracies("acceptance by distance", rows))
    for problem in description["problems"]:
        console.print(f"[bold red]problem:[/] {problem}", soft_wrap=True)
    fits = description["fits"]
    if fits and fits["fits"]:
        drift, how = fits["drift"], "sizes agree"
        if drift is not None:
            how += f", {drift:.1%} of the embedding's signs differ"
        console.print(f"[bold green]fits[/] {fits['model']} ({how})", soft_wrap=True)


def _facts(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) rows about the folder and its base model."""
    base = description["base_model"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    yield "base model", f"{base['name']}{revision}"
    # The authors' checkpoints say neither.
    yield "architecture", base["architecture"] or "unknown"
    vocabulary = base["vocab_size"]
    yield "vocabulary", "unknown" if vocabulary is None else f"{vocabulary:,}"
    ept = description["num_ept"]
    yield "prompt tokens", f"{description['num_prompt_tokens']}, with {ept} EPT each"
    yield "hidden size", f"{description['hidden_size']:,}"
    yield "trainable parameters", f"{description['trainable_parameters']:,}"
    yield "size", f"{description['bytes']:,} bytes"
    bigram_bytes = description["bigram_bytes"]
    yield "bigram table", f"{bigram_bytes:,} bytes" if bigram_bytes else "none"
    lengths = description["draft_lengths"]
    yield "draft lengths", ", ".join(map(str, lengths)) if lengths else "not calibrated"


def _training_facts(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    record = description["training"]
    if record is None:
        yield "training", f"no record ({TRAINING_FILE})"
        return
    units = (("steps", "steps"), ("seconds", "s"), ("positions", "predictions"))
    counts = [
        f"{record[key]:,.0f} {unit}"
        for key, unit in units
        if _are_numbers([record.get(key)])
    ]
    device = f" on {record['device']}" if isinstance(record.get("device"), str) else ""
    yield "training", (", ".join(counts) or "recorded") + device
    settings = record.get("settings")
    if isinstance(settings, dict):
        pairs = (f"{key} {value}" for key, value in settings.items())
        yield "trained with", ", ".join(p for p in pairs if not p.endswith(" None"))


def _are_numbers(values: Any) -> bool:
    """Whether a value in a training record is a list of numbers that can be shown."""
    return isinstance(values, list) and all(
        isinstance(each, int | float) and abs(each) < 1e15 for each in values
    )


def _accuracies(title: str, rows: list[tuple[str, list, list]]) -> Table:
    """Top-1 and top-10 accuracy per distance."""
    table = Table(title=f"{title} (top-1 / top-10)")
    table.add_column("against")
    for distance in range(1, 1 + max((len(top1) for _, top1, _ in rows), default=0)):
        table.add_column(f"+{distance}", justify="right")
    for label, top1, top10 in rows:
        pairs = zip(top1, top10, strict=False)
        table.add_row(label, *(f"{one:.3f} / {ten:.3f}" for one, ten in pairs))
    return table
