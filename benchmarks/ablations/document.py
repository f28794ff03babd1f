"""The results file: all runs, and the tables that they form."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result_file import read_results

from .plan import Table

__all__ = ["ablations_document", "read_document", "values"]

_SCRIPT = "ablations"


def ablations_document(
    tables: Sequence[Table],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What is committed. `records`: per run its records, one per seed."""
    return {
        "format": "ppd_benchmark",
        "format_version": 1,
        "script": _SCRIPT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": dict(environment),
        "settings": dict(settings),
        "tables": [
            {
                "key": table.key,
                "title": table.title,
                "variable": table.variable,
                "ordered": table.ordered,
                "rows": [
                    {"label": label, "run": run.name} for label, run in table.rows
                ],
            }
            for table in tables
        ],
        "runs": {
            name: [_without_table(record) for record in seeds]
            for name, seeds in records.items()
        },
    }


def _without_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of all 32 ranks stay in the work folder; trees are found from them."""
    acceptance = {k: v for k, v in record["acceptance"].items() if k != "table"}
    return {**record, "acceptance": acceptance}


def read_document(path: Path) -> dict[str, Any]:
    """A results file of this script; raises ValueError for anything else."""
    return read_results(path, _SCRIPT)


def values(results: Mapping[str, Any], run: str, *keys: str) -> list[Any]:
    """One figure of a run, for every seed: `values(results, "m", "cost", "bytes")`."""
    found = []
    for record in results["runs"][run]:
        for key in keys:
            record = record[key]
        found.append(record)
    return found
