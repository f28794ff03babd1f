"""What has been measured, one file per plan: a stopped command goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ppd.atomic import write_json
from vllm_ppd.plan import TreePlan

__all__ = ["RecordFolder", "plan_name"]

_IDENTITY = "settings.json"


def plan_name(plan: TreePlan, conditioned: bool) -> str:
    """The same for the same trees under the same source of guesses.

    Trees for 32 rows may be those for 64; they are measured once.
    """
    content = json.dumps([plan.to_dict(), conditioned], sort_keys=True)
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
        file = self.folder / _IDENTITY
        conditions = json.loads(json.dumps(dict(self.conditions)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_json(file, conditions)
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read or written ({error}); choose another --work"
            ) from error
        for key in sorted({*conditions, *found}):
            if conditions.get(key) != found.get(key):
                raise ValueError(
                    f"{self.folder} holds measurements with {key} {found.get(key)!r} "
                    f"instead of {conditions.get(key)!r}; give the same arguments, or "
                    "choose another folder with --work"
                )

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a plan; None while it is not measured."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        write_json(self.folder / f"{name}.json", dict(record))
