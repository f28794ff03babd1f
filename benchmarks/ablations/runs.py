"""Finished runs in a folder, one file each, and what they add up to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.result_file import open_work_folder
from vllm_ppd.files import write_json
from vllm_ppd.prompt_tokens.tokens import TENSOR_FILE, PromptTokens
from vllm_ppd.train.settings import TrainSettings

from .examination import Examination
from .plan import Run
from .workbench import Workbench

__all__ = ["RunFolder"]

_COST = "cost.json"


@dataclass(frozen=True)
class RunFolder:
    """Runs under equal conditions.

    `NAME,seed=K.json` is a finished run, the folder of the same name its prompt tokens,
    or its checkpoint while it is not finished.
    """

    folder: Path
    conditions: Mapping[str, Any]
    """Model, texts, seconds and the like: runs of other conditions do not compare."""

    def open(self) -> None:
        """Make the folder, or see that it holds runs of the same conditions.

        Raises ValueError when it holds others, or cannot be written.
        """
        open_work_folder(self.folder, self.conditions)

    def record(self, run: Run, seed: int) -> dict[str, Any] | None:
        """The figures of a finished run; None while it is not."""
        file = self.folder / f"{self._name(run.name, seed)}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def finish(
        self,
        run: Run,
        seed: int,
        settings: TrainSettings,
        bench: Workbench,
        examination: Examination,
        about: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Do what is left of a run, and keep its figures.

        settings: of the run, but for its seed. `about` goes into the record. Raises
        Interrupted when asked to stop, and can then be called again.
        """
        place = self.folder / self._name(run.name, seed)
        prompts, cost = self._trained(
            run, replace(settings, seed=seed), bench, place, seed
        )
        record = {
            "run": run.name,
            "seed": seed,
            "settings": shown_settings(run, settings),
            "cost": {
                **cost,
                "parameters": prompts.embeddings.numel(),
                "bytes": (place / TENSOR_FILE).stat().st_size,
            },
            **examination.of(bench, prompts.embeddings),
            **about,
        }
        write_json(place.with_name(place.name + ".json"), record)
        return record

    def _trained(
        self,
        run: Run,
        settings: TrainSettings,
        bench: Workbench,
        place: Path,
        seed: int,
    ) -> tuple[PromptTokens, dict[str, Any]]:
        file = place / _COST
        if not file.exists():
            start = None
            if run.init_from is not None:
                start = PromptTokens.load(self.folder / self._name(run.init_from, seed))
            trained = bench.train(
                settings,
                place,
                identity={"run": run.name, **shown_settings(run, settings)},
                initial=start,
                text_tokens=run.text_tokens,
            )
            trained.prompts.save(place, overwrite=True)
            write_json(file, trained.cost())
        return PromptTokens.load(place), json.loads(file.read_text("utf-8"))

    @staticmethod
    def _name(run: str, seed: int) -> str:
        return f"{run},seed={seed}"


def shown_settings(run: Run, settings: TrainSettings) -> dict[str, Any]:
    """What a run trained with, as JSON."""
    return {
        "num_prompt_tokens": settings.num_prompt_tokens,
        "num_ept": settings.num_ept,
        "points": settings.points,
        "updates": settings.updates,
        "loss": settings.loss,
        "alpha": settings.alpha,
        "init": run.init_from or settings.init,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "length": settings.length,
        "seconds": round(60 * (settings.minutes or 0), 2),
        "text_tokens": run.text_tokens,
    }
