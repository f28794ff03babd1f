"""What has been measured, one file per plan: a stopped command goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result_file import open_work_folder
from vllm_ppd.files import write_json
from vllm_ppd.trees.menu import TreePlan

__all__ = ["RecordFolder", "plan_name"]


def plan_name(plan: TreePlan, bigram: bool) -> str:
    """The same for the same trees under the same source of guesses.

    Trees for 32 rows may be those for 64; they are measured once.
    """
    content = json.dumps([plan.to_dict(), bigram], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RecordFolder:
    """`NAME.json` is what one plan accepted; all under equal conditions."""

    folder: Path
    conditions: Mapping[str, Any]
    """Model, prompt tokens, text and lengths: figures of others do not compare."""

    def open(self) -> None:
        """Make the folder, or see that it holds records of the same conditions.

        Raises ValueError when it holds others, or cannot be written.
        """
        open_work_folder(self.folder, self.conditions)

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a plan; None while it is not measured."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        write_json(self.folder / f"{name}.json", dict(record))
