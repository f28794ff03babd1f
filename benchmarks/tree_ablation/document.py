"""The results file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result_file import read_results

__all__ = ["cells_of", "read_document", "tree_document"]

_SCRIPT = "tree_ablation"


def tree_document(
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    predicted: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    chosen: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What is committed: cells of each kind, see `prediction` and `command`."""
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": _SCRIPT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": dict(environment),
        "settings": dict(settings),
        "predicted": [dict(cell) for cell in predicted],
        "measured": [dict(cell) for cell in measured],
        "chosen": [dict(cell) for cell in chosen],
    }


def read_document(path: Path) -> dict[str, Any]:
    """A results file of this script; raises ValueError for anything else."""
    return read_results(path, _SCRIPT)


def cells_of(cells: Sequence[Mapping[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The cells with these values, in their order."""
    return [
        dict(cell)
        for cell in cells
        if all(cell[key] == value for key, value in wanted.items())
    ]
