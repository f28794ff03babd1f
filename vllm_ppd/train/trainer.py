"""The training loop (as the paper trains): AdamW on the prompt table, model frozen.

A batch runs through the frozen model once and serves several steps, each with other
insertion points: what the pass leaves does not change with the table. Batches depend on
the seed, the step and the process only, never on what came before, so a run continued
from its checkpoint, also in the middle of a batch, is the run that was never stopped.
(With a time budget the learning rate follows the clock; then this holds up to timing.)
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from vllm_ppd.train.batch import Batch
from vllm_ppd.train.checkpoint import Checkpoint
from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.early_stop import best_record, evaluations_since_best
from vllm_ppd.train.evaluation import evaluate
from vllm_ppd.train.forward import insertion_loss
from vllm_ppd.train.model import FrozenModel, OrdinaryRows
from vllm_ppd.train.progress import Moment, joined, training_bar
from vllm_ppd.train.scores import Scores
from vllm_ppd.train.settings import TrainSettings
from vllm_ppd.train.stopping import stopping_signals
from vllm_ppd.train.table import PromptTable

__all__ = ["Interrupted", "Result", "Schedule", "Trainer"]

CHECKPOINT_FILE = "checkpoint.safetensors"
# Scores cost about as much as the loss; the progress bar needs only a sample of them.
_SCORE_EVERY = 10


class Interrupted(Exception):
    """Training was asked to stop; its checkpoint is saved."""


@dataclass(frozen=True)
class Schedule:
    """How often things happen; changes no result."""

    evaluations: int = 8
    """Held-out evaluations, evenly spread over the run, besides one at its start."""
    evaluation_sequences: int = 64
    checkpoint_every: int = 100
    """Steps."""


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run."""

    table: torch.Tensor
    """float32 [m, e, hidden], on the CPU: the best of the evaluated ones if the run
    had `patience`, else the last."""
    held_out: dict[str, Any] | None
    """The evaluation of `table`."""
    steps: int
    seconds: float
    """Training time over all starts, evaluations included."""
    positions: int
    """Supervised predictions, over all starts and processes."""
    positions_per_second: float
    """Of the last start, evaluations not counted."""
    history: list[dict[str, Any]]
    """Held-out evaluations: step, seconds, and `Scores.summary`."""
    stopped_early: bool = False


@dataclass
class Trainer:
    """One run. `run_id` tells its checkpoint from those of other runs."""

    model: FrozenModel
    train_stream: TokenStream
    held_out: TokenStream
    settings: TrainSettings
    accelerator: Accelerator
    folder: Path
    run_id: dict[str, Any]
    schedule: Schedule = field(default_factory=Schedule)
    quiet: bool = False

    def __post_init__(self) -> None:
        self._step = 0
        self._used = 0.0
        # Seconds and number of this start's steps.
        self._busy, self._done = 1e-9, 0
        self._positions = 0
        self._history: list[dict[str, Any]] = []
        self._best: torch.Tensor | None = None
        self._pass: tuple[int, Batch, OrdinaryRows] | None = None
        self._stop = False

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / CHECKPOINT_FILE

    def run(self, initial: torch.Tensor, *, resume: bool = False) -> Result:
        """Train from `initial` [m, e, hidden], or from the folder's checkpoint.

        Raises Interrupted after Ctrl-C or a termination signal, with the checkpoint
        saved; CheckpointError when the checkpoint is another run's or cannot be
        written; DataError when the data allow no insertion.
        """
        table = PromptTable(initial.to(self.accelerator.device))
        if resume and self.checkpoint_path.exists():
            saved = Checkpoint.load(self.checkpoint_path, self.run_id)
        else:
            saved = None
        if saved is not None:
            table = PromptTable(saved.table.to(self.accelerator.device))
        self._table = table
        optimiser = torch.optim.AdamW(
            # The rate is set step by step.
            table.parameters(),
            lr=0.0,
            weight_decay=0.0,
        )
        self._optimiser = optimiser
        if saved is not None:
            self._restore(saved)
        module, wrapped = self.accelerator.prepare(table, optimiser)
        with stopping_signals(self._ask_to_stop):
            return self._loop(module, wrapped)

    def _loop(self, module: Any, optimiser: Any) -> Result:
        start = time.monotonic() - self._used
        processes = self.accelerator.num_processes
        tokens = self.settings.text_tokens_per_step
        before, smooth = self._positions, math.nan
        recent = Scores.zeros(self.settings.num_prompt_tokens)
        hidden = self.quiet or not self.accelerator.is_main_process
        with training_bar(self.settings, self._step, self._used, hidden) as bar:
            while True:
                self._used = time.monotonic() - start
                progress, steps, stop = self._progress()
                exhausted = self._evaluate_if_due(progress)
                if progress >= 1.0 or exhausted:
                    break
                if stop or self._checkpoint_due():
                    self._save_checkpoint()
                if stop:
                    raise Interrupted(
                        f"stopped after step {self._step}; the checkpoint is "
                        f"{self.checkpoint_path}"
                    )
                begun = time.monotonic()
                loss, count, scores = self._train_step(
                    module, optimiser, self.settings.learning_rate_at(progress, steps)
                )
                self._busy += time.monotonic() - begun
                self._done += 1
                self._positions += count
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
                if scores is not None:
                    recent = scores
                self._step += 1
                Moment(
                    step=self._step,
                    start=start,
                    loss=smooth,
                    scores=recent,
                    positions_per_second=(self._positions - before)
                    * processes
                    / self._busy,
                    tokens_per_second=self._done * tokens * processes / self._busy,
                ).show(bar)
        table, held_out = self._kept()
        return Result(
            table=table.cpu().clone(),
            held_out=held_out,
            stopped_early=exhausted and progress < 1.0,
            steps=self._step,
            seconds=self._used,
            positions=self._positions * processes,
            positions_per_second=(self._positions - before) * processes / self._busy,
            history=self._history,
        )

    def _train_step(
        self, module: Any, optimiser: Any, rate: float
    ) -> tuple[float, int, Scores | None]:
        """One update; loss, supervised predictions and, at times, their scores."""
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch, ordinary = self._batch_of_step()
        insertion = batch.insertions[self._step % self.settings.updates]
        loss, scores = insertion_loss(
            self.model,
            module(),
            batch.ids,
            insertion,
            ordinary=ordinary,
            alpha=self.settings.alpha,
            kind=self.settings.loss,
            with_scores=self._step % _SCORE_EVERY == 0,
        )
        self.accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        count = int(insertion.valid.sum()) * self.settings.num_prompt_tokens
        return loss.item(), count, scores

    def _batch_of_step(self) -> tuple[Batch, OrdinaryRows]:
        """Sequences of this step, and the pass over them, made once for its updates."""
        number = self._step // self.settings.updates
        if self._pass is None or self._pass[0] != number:
            # Freed before the next one takes its memory.
            self._pass = None
            batch = Batch.draw(
                self.train_stream,
                self.settings,
                number,
                self.accelerator.process_index,
            ).to(self.accelerator.device)
            mask = batch.insertions[0].attention_mask
            self._pass = (number, batch, self.model.ordinary_rows(batch.ids, mask))
        return self._pass[1:]

    def _progress(self) -> tuple[float, float, bool]:
        """Part of the budget used, steps of the whole run, and whether to stop.

        Equal in all processes. With a time budget the steps are a guess, from the
        speed so far.
        """
        if self.settings.steps is not None:
            steps: float = self.settings.steps
            progress = self._step / steps
        else:
            budget = 60.0 * (self.settings.minutes or 1.0)
            # The first step has no speed to go by, but is a step.
            steps = max(1.0, self._done / self._busy * budget)
            progress = self._used / budget
        progress, steps, stop = self._agreed([progress, steps, self._stop])
        return float(progress), float(steps), bool(stop)

    def _agreed(self, values: list[Any]) -> list[Any]:
        """The main process's values, in all processes."""
        if self.accelerator.num_processes > 1:
            broadcast_object_list(values)
        return values

    def _evaluate_if_due(self, progress: float) -> bool:
        """Returns whether the run's patience is at an end."""
        spacing = 1.0 / max(1, self.schedule.evaluations)
        # The small surplus absorbs rounding of progress at its last multiple.
        due = 1 + int(min(progress, 1.0) / spacing + 1e-9)
        if len(self._history) >= due:
            return False
        scores = evaluate(
            self.model,
            self._table.embeddings.detach(),
            self.held_out,
            self.settings,
            self.schedule.evaluation_sequences,
        )
        rates = {
            key: [round(value, 4) for value in values]
            for key, values in scores.summary().items()
        }
        record = {"step": self._step, "seconds": round(self._used, 1), **rates}
        # Evaluations that a slow step skipped over are the same evaluation.
        self._history += [record] * (due - len(self._history))
        self._say(
            f"step {self._step}: held-out KL {joined(rates['kl'], '.2f')}, "
            f"top-1 {joined(rates['model_top1'], '.3f')}, "
            f"top-10 {joined(rates['model_top10'], '.3f')}"
        )
        if self.settings.patience is None:
            return False
        waited = evaluations_since_best(self._history, self.settings.alpha)
        if waited == 0:
            self._best = self._table.embeddings.detach().clone()
        return bool(self._agreed([waited >= self.settings.patience])[0])

    def _kept(self) -> tuple[torch.Tensor, dict[str, Any] | None]:
        """The table that the run is for, and its evaluation."""
        if self._best is not None:
            return self._best, best_record(self._history, self.settings.alpha)
        last = self._history[-1] if self._history else None
        return self._table.embeddings.detach(), last

    def _checkpoint_due(self) -> bool:
        return self._step > 0 and self._step % self.schedule.checkpoint_every == 0

    def _save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        parameter = self._table.embeddings
        state = self._optimiser.state.get(parameter, {})
        Checkpoint(
            table=parameter.detach(),
            exp_avg=state.get("exp_avg", torch.zeros_like(parameter)),
            exp_avg_sq=state.get("exp_avg_sq", torch.zeros_like(parameter)),
            best=self._best,
            step=self._step,
            seconds=self._used,
            positions=self._positions,
            run=self.run_id,
            history=self._history,
        ).save(self.checkpoint_path)

    def _restore(self, saved: Checkpoint) -> None:
        parameter = self._table.embeddings
        if saved.step > 0:
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(saved.step)),
                "exp_avg": saved.exp_avg.to(parameter.device),
                "exp_avg_sq": saved.exp_avg_sq.to(parameter.device),
            }
        self._step, self._used = saved.step, saved.seconds
        self._positions = saved.positions
        self._history = list(saved.history)
        if saved.best is not None:
            self._best = saved.best.to(parameter.device)
        self._say(f"continuing after step {saved.step}")

    def _ask_to_stop(self) -> None:
        self._stop = True

    def _say(self, sentence: str) -> None:
        if self.accelerator.is_main_process and not self.quiet:
            tqdm.write(sentence)
