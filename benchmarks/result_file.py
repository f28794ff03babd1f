"""Results files as all scripts here write them, and folders of unfinished work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ppd.files import write_json

__all__ = ["open_work_folder", "read_results"]

_CONDITIONS = "conditions.json"


def read_results(path: Path, script: str | None = None) -> dict[str, Any]:
    """A results file; raises ValueError for anything else.

    script: whose it must be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    found = content if isinstance(content, dict) else {}
    if (found.get("format"), found.get("format_version")) != ("ppd_benchmark", 1):
        raise ValueError(f"{path} is no results file of this version")
    if script is not None and found.get("script") != script:
        raise ValueError(
            f"{path} is no results file of {script}; make one with "
            f"python -m benchmarks.{script}"
        )
    return found


def open_work_folder(folder: Path, conditions: Mapping[str, Any]) -> None:
    """Make a folder, or see that what it holds was made under the same conditions.

    Raises ValueError when it was not, or when the folder cannot be written.
    """
    file = folder / _CONDITIONS
    wanted = json.loads(json.dumps(dict(conditions)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, wanted)
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read or written ({error}); choose another --work"
        ) from error
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            raise ValueError(
                f"{folder} holds work with {key} {found.get(key)!r} instead of "
                f"{wanted.get(key)!r}; give the same arguments, or choose another "
                "folder with --work"
            )
