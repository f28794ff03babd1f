"""Hugging Face datasets as training text: copied once into a .jsonl file.

The copy is what the run reads, hashes and resumes from, so a data set that changes on
the hub cannot change a run half-way, and everything else deals with files alone. Rows
are streamed: a large data set is fetched only as far as it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_ppd.files import explained, replacing
from vllm_ppd.train.documents import content_of
from vllm_ppd.train.settings import TrainingError

# owner/name, then perhaps :configuration and @split.
_NAME = re.compile(
    r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?"
)
_FOLDER = re.compile(r"(?P<path>.+?)(:(?P<config>[\w.-]+))?(@(?P<split>[^@/]+))?")
_TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".csv", ".parquet")
# `Dataset.save_to_disk` leaves one of these.
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class DatasetName:
    """`PATH[:CONFIGURATION][@SPLIT]`, where PATH is a folder or a hub id."""

    path: str
    config: str | None
    split: str
    is_folder: bool

    @classmethod
    def parse(cls, text: str) -> DatasetName | None:
        """None for what can only be a text file: one that exists, or looks like one."""
        if Path(text).is_file():
            return None
        match = _FOLDER.fullmatch(text)
        is_folder = match is not None and Path(match["path"]).is_dir()
        if not is_folder:
            match = _NAME.fullmatch(text)
            if match is None or match["path"].endswith(_TEXT_SUFFIXES):
                return None
            # A missing file of an existing folder.
            if Path(match["path"]).parent.is_dir():
                return None
        assert match is not None
        return cls(match["path"], match["config"], match["split"] or "train", is_folder)

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.path}{config}@{self.split}"

    def file_name(self, max_bytes: int, seed: int) -> str:
        """Where its copy goes: another data set, limit or order is another file."""
        parts: list[Any] = [str(self), max_bytes, seed]
        if self.is_folder:
            files = sorted(p for p in Path(self.path).rglob("*") if p.is_file())
            parts += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
        stem = re.sub(
            r"[^\w.]+", "-", Path(self.path).name if self.is_folder else self.path
        ).strip("-")
        return f"{stem}-{self.split}-{digest}.jsonl"


def copy_dataset(
    name: DatasetName,
    folder: str | os.PathLike[str],
    *,
    max_bytes: int,
    seed: int = 0,
    quiet: bool = True,
) -> Path:
    """The .jsonl file in `folder` with the data set's rows; made if missing.

    Rows come shuffled (a stream within a buffer) until `max_bytes` are written. Raises
    TrainingError when the package `datasets` is missing, the data set cannot be loaded
    or has rows of unknown form, and when the file cannot be written.
    """
    target = Path(folder) / name.file_name(max_bytes, seed)
    if target.is_file():
        return target
    try:
        import datasets
    except ImportError as error:
        raise TrainingError(
            f"{str(name)!r} is a Hugging Face data set, which needs the package "
            "datasets: pip install datasets, or give a .jsonl or text file"
        ) from error
    rows = _rows(datasets, name, seed)
    what = f"the copy of data set {name} cannot be written to {target}"
    with explained(TrainingError, what, "choose another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(desc=f"reading {name}", unit="B", unit_scale=True, disable=quiet)
        with replacing(target) as file, bar:
            written = 0
            for number, row in enumerate(rows, start=1):
                content = content_of(row)
                if content is None:
                    raise TrainingError(
                        f"row {number} of data set {name} has the columns {list(row)}; "
                        'expected "text", "messages", "conversations" or "prompt"'
                    )
                key = "text" if isinstance(content, str) else "messages"
                line = json.dumps({key: content}, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                bar.update(len(line))
                written += len(line)
                if written >= max_bytes:
                    break
            if not written:
                raise TrainingError(
                    f"data set {name} has no rows; expected at least one document"
                )
    return target


def _rows(datasets: Any, name: DatasetName, seed: int) -> Iterator[Mapping[str, Any]]:
    try:
        saved = name.is_folder and any(
            (Path(name.path) / file).exists() for file in _SAVED
        )
        if saved:
            loaded = datasets.load_from_disk(name.path)
            if isinstance(loaded, dict):  # a DatasetDict
                loaded = loaded[name.split]
        else:
            loaded = datasets.load_dataset(
                name.path, name.config, split=name.split, streaming=True
            )
        yield from loaded.shuffle(seed=seed)
    # datasets raises many unrelated types (HTTP, OS, missing split, bad JSON).
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"data set {name} cannot be read ({type(error).__name__}: "
            f"{reason.rstrip('.')}); check its name, configuration and split "
            "(NAME:CONFIGURATION@SPLIT), or give a .jsonl or text file"
        ) from error
