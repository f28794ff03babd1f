"""The training loop: AdamW on the table of prompt embeddings, the model frozen.

A batch runs through the frozen model once and serves several steps, each with other
insertion points: the hidden states, keys and values of a text do not change with the
table. A batch depends on the seed, the step and the process only. A run continued from
its checkpoint, also in the middle of a batch, therefore equals the undisturbed run.
(With a time budget the learning rate follows the clock; then this holds up to timing.)
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from vllm_ppd.train.checkpoint import Checkpoint, stopping_signals
from vllm_ppd.train.data import Batch, TokenStream
from vllm_ppd.train.forward import evaluate, insertion_loss
from vllm_ppd.train.model import FrozenModel, OrdinaryRows, PromptTable
from vllm_ppd.train.scores import Scores
from vllm_ppd.train.settings import TrainSettings, check_counts

CHECKPOINT_FILE = "checkpoint.safetensors"
# Scores cost about as much as the loss; the progress bar needs only a sample of them.
_SCORE_EVERY = 10
# Held-out evaluations take at most this part of a time budget.
_EVALUATION_SHARE = 0.1


class Interrupted(Exception):
    """Training was asked to stop; its checkpoint is saved."""


@dataclass(frozen=True)
class Schedule:
    """When to evaluate and to save; changes no table."""

    evaluations: int = 8
    """Held-out evaluations, evenly spread over the run, besides one at its start."""
    evaluation_sequences: int = 64
    """At most; with a time budget, all evaluations together take a tenth of it."""
    checkpoint_every: int = 100
    """Steps."""

    def __post_init__(self) -> None:
        check_counts(self, "evaluations", least=0)
        check_counts(self, "evaluation_sequences", "checkpoint_every")


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run."""

    table: torch.Tensor
    """float32 [m, e, hidden], on the CPU."""
    steps: int
    seconds: float
    """Training time over all starts, evaluations included."""
    positions: int
    """Supervised predictions, over all starts and processes."""
    positions_per_second: float
    """Of the last start, evaluations not counted."""
    history: list[dict[str, Any]]
    """Held-out evaluations: step, progress, seconds, sequences and `Scores.summary`;
    the last one is of `table`."""


@dataclass
class Trainer:
    """One run. `run_id` identifies the run that a checkpoint belongs to."""

    model: FrozenModel
    train_stream: TokenStream
    held_out: TokenStream
    settings: TrainSettings
    accelerator: Accelerator
    folder: Path
    run_id: dict[str, Any]
    schedule: Schedule = field(default_factory=Schedule)
    quiet: bool = False
    """Say nothing, as all processes but the main one should."""

    def __post_init__(self) -> None:
        self._step = 0
        self._elapsed = 0.0
        # Seconds and number of this start's steps.
        self._busy, self._steps_here = 1e-9, 0
        self._positions = 0
        self._history: list[dict[str, Any]] = []
        # Of the longest evaluation of this start.
        self._evaluation_seconds = 0.0
        self._pass: tuple[int, Batch, OrdinaryRows] | None = None
        self._stop = threading.Event()

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / CHECKPOINT_FILE

    def run(self, initial: torch.Tensor, *, resume: bool = False) -> Result:
        """Train from `initial` [m, e, hidden], or from the folder's checkpoint.

        Raises Interrupted after Ctrl-C or a termination signal, with the checkpoint
        saved; TrainingError when the checkpoint is another run's or cannot be written,
        and when the data allow no insertion.
        """
        saved = None
        if resume and self.checkpoint_path.exists():
            saved = Checkpoint.load(self.checkpoint_path, self.run_id)
            initial = saved.table
        self._table = PromptTable(initial.to(self.accelerator.device))
        self._optimiser = torch.optim.AdamW(
            # The rate is set step by step.
            self._table.parameters(),
            lr=0.0,
            weight_decay=0.0,
        )
        if saved is not None:
            self._restore(saved)
        module, wrapped = self.accelerator.prepare(self._table, self._optimiser)
        with stopping_signals(self._stop.set):
            return self._loop(module, wrapped)

    def _loop(self, module: Any, optimiser: Any) -> Result:
        start = time.monotonic() - self._elapsed
        processes = self.accelerator.num_processes
        first_positions, smooth, speed = self._positions, math.nan, 0.0
        recent = Scores.zeros(self.settings.num_prompt_tokens)
        with self._bar() as bar:
            while True:
                self._elapsed = time.monotonic() - start
                progress, steps, stop = self._progress()
                self._evaluate_if_due(progress)
                if progress >= 1.0:
                    break
                every = self.schedule.checkpoint_every
                if stop or (self._step > 0 and self._step % every == 0):
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
                self._steps_here += 1
                self._positions += count
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
                if scores is not None:
                    recent = scores
                self._step += 1
                speed = (self._positions - first_positions) * processes / self._busy
                self._show(bar, start, smooth, recent, speed)
        return Result(
            table=self._table.embeddings.detach().cpu().clone(),
            steps=self._step,
            seconds=self._elapsed,
            positions=self._positions * processes,
            positions_per_second=speed,
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
                self.train_stream, self.settings, number, self.accelerator.process_index
            ).to(self.accelerator.device)
            self._pass = (number, batch, self.model.ordinary_rows(batch.ids))
        return self._pass[1:]

    def _progress(self) -> tuple[float, float, bool]:
        """Part of the budget that is gone, steps of the whole run, whether to stop.

        Equal in all processes. With a time budget the steps are an estimate, from the
        speed so far.
        """
        if self.settings.steps is not None:
            steps: float = self.settings.steps
            progress = self._step / steps
        else:
            # The first step has no speed to go by, but is a step.
            steps = max(1.0, self._steps_here / self._busy * self._budget)
            progress = self._elapsed / self._budget
        stop = self._stop.is_set()
        progress, steps, stop = self._agreed([progress, steps, stop])
        return float(progress), float(steps), stop

    @property
    def _budget(self) -> float:
        """Seconds that the run may take; infinite if steps are its budget."""
        return 60.0 * (self.settings.minutes or math.inf)

    def _agreed(self, values: list[Any]) -> list[Any]:
        """The main process's values, in all processes."""
        if self.accelerator.num_processes > 1:
            broadcast_object_list(values)
        return values

    def _evaluate_if_due(self, progress: float) -> None:
        if self._history and not self._evaluation_due(progress):
            return
        share = _EVALUATION_SHARE * self._budget / (self.schedule.evaluations + 1)
        begun = time.monotonic()
        scores, sequences = evaluate(
            self.model,
            self._table.embeddings.detach(),
            self.held_out,
            self.settings,
            self.schedule.evaluation_sequences,
            # The first evaluation decides how much text all of them take.
            limit=self._history[0]["sequences"] if self._history else None,
            seconds=math.inf if self._history else share,
            quiet=self.quiet,
        )
        seconds = max(self._evaluation_seconds, time.monotonic() - begun)
        seconds, sequences = self._agreed([seconds, sequences])
        self._evaluation_seconds = seconds
        rates = {
            key: [round(value, 4) for value in values]
            for key, values in scores.summary().items()
        }
        place = {"step": self._step, "progress": progress, "sequences": sequences}
        self._history.append({**place, "seconds": round(self._elapsed, 1), **rates})
        self._say(
            f"step {self._step}: held-out KL {_joined(rates['kl'], '.2f')}, "
            f"top-1 {_joined(rates['model_top1'], '.3f')}, "
            f"top-10 {_joined(rates['model_top10'], '.3f')} "
            f"({sequences} sequences, {seconds:.0f} s)"
        )

    def _evaluation_due(self, progress: float) -> bool:
        """Whether a multiple of the spacing lies between here and the last one."""
        count = max(1, self.schedule.evaluations)
        if self._evaluation_seconds:
            # Where even one batch of sequences takes too long, there are fewer.
            affordable = _EVALUATION_SHARE * self._budget / self._evaluation_seconds
            count = max(1, int(min(count, affordable - 1)))
        # The small surplus absorbs rounding of progress at its last multiple.
        last, here = (
            int(min(each, 1.0) * count + 1e-9)
            for each in (self._history[-1]["progress"], progress)
        )
        return here > last

    def _save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        parameter = self._table.embeddings
        state = self._optimiser.state.get(parameter, {})
        Checkpoint(
            table=parameter.detach(),
            exp_avg=state.get("exp_avg", torch.zeros_like(parameter)),
            exp_avg_sq=state.get("exp_avg_sq", torch.zeros_like(parameter)),
            step=self._step,
            seconds=self._elapsed,
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
        self._step, self._elapsed = saved.step, saved.seconds
        self._positions = saved.positions
        self._history = list(saved.history)
        self._say(f"continuing after step {saved.step}")

    def _say(self, sentence: str) -> None:
        if not self.quiet:
            tqdm.write(sentence)

    def _bar(self) -> tqdm:
        """A progress bar over the steps, or over the seconds of a time budget."""
        timed = self.settings.steps is None
        return tqdm(
            total=round(self._budget) if timed else self.settings.steps,
            initial=int(self._elapsed) if timed else self._step,
            unit="s" if timed else "step",
            desc="training",
            disable=self.quiet,
            dynamic_ncols=True,
        )

    def _show(
        self, bar: tqdm, start: float, loss: float, scores: Scores, speed: float
    ) -> None:
        """Move the bar; tqdm decides when to draw it."""
        if bar.disable:
            return
        elapsed = time.monotonic() - start
        left = self._budget - elapsed
        done = min(int(elapsed), int(bar.total))
        if self.settings.steps is not None:
            # Training time of earlier starts counts, like their steps.
            left = (self.settings.steps - self._step) * elapsed / self._step
            done = self._step
        end = time.strftime("%H:%M", time.localtime(time.time() + max(0.0, left)))
        summary = scores.summary()
        bar.set_postfix_str(
            f"loss {loss:.3f}, top-1 {_joined(summary['model_top1'], '.2f')}, "
            f"{speed:.0f} positions/s, ends about {end}",
            refresh=False,
        )
        bar.update(done - bar.n)


def _joined(values: list[float], spec: str) -> str:
    """Numbers, one per distance."""
    return " ".join(format(value, spec) for value in values)
