"""`vllm-ppd inspect`: what a prompt-token folder holds, and whether it fits a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

TRAINING_FILE = "training.json"
ACCEPTANCE_FILE = "acceptance.json"

# Accuracies in a training record and what they were measured against.
_ACCURACIES = (
    ("model", "the model's choice"),
    ("greedy", "... on its own path"),
    ("true", "the text"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder or hub id of prompt tokens")
    parser.add_argument(
        "--model",
        help="also check that they fit this model (a folder; a hub id is downloaded); "
        "the exit status is 1 if they do not",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables"
    )


def describe(path: str, model: str | None = None) -> dict[str, Any]:
    """Everything that `inspect` shows, as JSON.

    `problems` lists, a sentence each, what keeps the folder from being used with
    `model` or a file in it from being read. Raises ValueError when there are no
    readable prompt tokens, or no such model, at all.
    """
    from vllm_ppd.hub import resolve_path
    from vllm_ppd.prompt_tokens.peft import is_peft_checkpoint
    from vllm_ppd.prompt_tokens.tokens import FORMAT_VERSION, PromptTokens, tensor_file

    folder = resolve_path(path)
    prompts = PromptTokens.load(folder)
    problems: list[str] = []
    found: dict[str, Any] = {
        "path": path,
        # The authors' layout has no version of its own.
        "format_version": None if is_peft_checkpoint(folder) else FORMAT_VERSION,
        "num_prompt_tokens": prompts.num_prompt_tokens,
        "num_ept": prompts.num_ept,
        "hidden_size": prompts.hidden_size,
        "trainable_parameters": prompts.embeddings.numel(),
        "bytes": tensor_file(folder).stat().st_size,
        # One list per prompt token, one norm per ensemble member.
        "norms": prompts.embeddings.norm(dim=-1).tolist(),
        "base_model": dataclasses.asdict(prompts.base),
        "training": _training(folder, problems),
        "acceptance": _acceptance(folder, prompts.num_prompt_tokens, problems),
        "fits": _fits(prompts, model, problems) if model else None,
        "problems": problems,
    }
    return found


def _fits(prompts: Any, model: str, problems: list[str]) -> dict[str, Any]:
    from vllm_ppd.hub import resolve_path
    from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
    from vllm_ppd.prompt_tokens.tokens import PromptTokensError

    fingerprint = BaseModelFingerprint.of_folder(resolve_path(model), name=model)
    known = prompts.base.embedding_sha256 and fingerprint.embedding_sha256
    try:
        prompts.check_against(fingerprint)
    except PromptTokensError as error:
        problems.append(str(error))
    return {
        "model": model,
        "fits": not prompts.base.differences(fingerprint),
        "weights_compared": bool(known),
    }


def _training(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """The training record; its evaluations but the last are left out."""
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problems.append(f"{path} cannot be read as JSON: {error}")
        return None
    if not isinstance(record, dict):
        problems.append(f"{path} holds no JSON object")
        return None
    return {key: value for key, value in record.items() if key != "history"}


def _acceptance(
    folder: Path, num_prompt_tokens: int, problems: list[str]
) -> dict[str, Any] | None:
    from vllm_ppd.search.acceptance_table import AcceptanceError, AcceptanceStats

    path = folder / ACCEPTANCE_FILE
    if not path.is_file():
        return None
    try:
        table = AcceptanceStats.load(path)
    except AcceptanceError as error:
        problems.append(str(error))
        return None
    if table.num_prompt_tokens != num_prompt_tokens:
        problems.append(
            f"{path} is about {table.num_prompt_tokens} prompt tokens, but the folder "
            f"holds {num_prompt_tokens}; measure it again"
        )
    sums = table.acceptance.cumsum(axis=1)
    return {
        "ranks": table.num_ranks,
        "top1": sums[:, 0].tolist(),
        "top10": sums[:, min(10, table.num_ranks) - 1].tolist(),
    }


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 when there is a problem, such as a model that differs."""
    found = describe(args.path, args.model)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 1 if found["problems"] else 0


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table(title=f"prompt tokens in {found['path']}", show_header=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    training = found["training"] or {}
    if isinstance(training.get("held_out"), dict):
        rows = _training_rows(training["held_out"])
        console.print(_accuracies("held-out accuracy after training", rows))
    if found["acceptance"]:
        table = found["acceptance"]
        rows = [("measured", table["top1"], table["top10"])]
        console.print(_accuracies("acceptance statistics", rows))
    for problem in found["problems"]:
        console.print(f"[bold red]problem:[/] {problem}", soft_wrap=True)
    fits = found["fits"]
    if fits and fits["fits"]:
        how = "sizes and weights agree" if fits["weights_compared"] else "sizes agree"
        console.print(f"[bold green]fits[/] {fits['model']} ({how})", soft_wrap=True)


def _facts(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) lines of the first table."""
    base = found["base_model"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    yield "base model", f"{base['name']}{revision}"
    # The authors' checkpoints say neither.
    yield "architecture", base["architecture"] or "unknown"
    vocabulary = base["vocab_size"]
    yield "vocabulary", "unknown" if vocabulary is None else f"{vocabulary:,}"
    yield "weights known by", (base["embedding_sha256"] or "nothing (no hash)")[:16]
    yield "prompt tokens", str(found["num_prompt_tokens"])
    ensemble = "member" if found["num_ept"] == 1 else "members"
    yield "ensemble", f"{found['num_ept']} {ensemble} per prompt token"
    yield "hidden size", f"{found['hidden_size']:,}"
    yield "trainable parameters", f"{found['trainable_parameters']:,}"
    yield "size", f"{found['bytes']:,} bytes"
    for number, norms in enumerate(found["norms"], start=1):
        values = ", ".join(f"{norm:.3f}" for norm in norms[:6])
        yield f"norm of token {number}", values + (", ..." if len(norms) > 6 else "")
    yield from _training_facts(found["training"])


def _training_facts(record: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if record is None:
        yield "training", "no record (training.json)"
        return
    counts = [
        f"{record[key]:,.0f} {unit}"
        for key, unit in (
            ("steps", "steps"),
            ("seconds", "s"),
            ("positions", "predictions"),
        )
        if isinstance(record.get(key), int | float)
    ]
    device = f" on {record['device']}" if isinstance(record.get("device"), str) else ""
    yield "training", (", ".join(counts) or "recorded") + device
    settings = record.get("settings")
    if isinstance(settings, dict):
        shown = (f"{k} {v}" for k, v in settings.items() if v is not None)
        yield "trained with", ", ".join(shown)


def _training_rows(scores: dict[str, Any]) -> list[tuple[str, list, list]]:
    """The accuracies that a record has, as (against what, top-1, top-10)."""
    return [
        (label, scores[f"{key}_top1"], scores[f"{key}_top10"])
        for key, label in _ACCURACIES
        if isinstance(scores.get(f"{key}_top1"), list)
        and isinstance(scores.get(f"{key}_top10"), list)
    ]


def _accuracies(title: str, rows: list[tuple[str, list, list]]) -> Table:
    """Top-1/top-10 per distance."""
    from rich.table import Table

    table = Table(title=f"{title} (top-1 / top-10)")
    table.add_column("against")
    distances = max((len(top1) for _, top1, _ in rows), default=0)
    for distance in range(1, distances + 1):
        table.add_column(f"+{distance}", justify="right")
    for label, top1, top10 in rows:
        pairs = zip(top1, top10, strict=False)
        table.add_row(label, *(f"{one:.3f} / {ten:.3f}" for one, ten in pairs))
    return table
