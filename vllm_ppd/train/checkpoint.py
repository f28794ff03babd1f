"""State of an unfinished run in one file, written atomically.

Every batch depends on the seed and the step only, so the table, AdamW's moments, the
step and the elapsed time are all that a run needs to continue as if never stopped.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from vllm_ppd.files import explained, write_bytes
from vllm_ppd.train.settings import TrainingError

_TENSORS = ("table", "exp_avg", "exp_avg_sq")
_FIGURES = ("step", "seconds", "positions", "run", "history")
_METADATA = "ppd_train"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to continue."""

    table: torch.Tensor
    """float32 [m, e, hidden]."""
    exp_avg: torch.Tensor
    """float32 [m, e, hidden]: AdamW's first moment."""
    exp_avg_sq: torch.Tensor
    """float32 [m, e, hidden]: AdamW's second moment."""
    step: int
    """Optimiser steps done."""
    seconds: float
    """Training time, over all starts."""
    positions: int
    """Supervised predictions so far, of one process."""
    run: dict[str, Any]
    """Settings, model and data of the run, to tell it from others."""
    history: list[dict[str, Any]]
    """Held-out evaluations so far."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write atomically, over an earlier checkpoint. Raises TrainingError."""
        about = {name: getattr(self, name) for name in _FIGURES}
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        metadata = {_METADATA: json.dumps(about)}
        what = f"the checkpoint cannot be written to {path}"
        remedy = "make room and continue with --resume, or choose another folder"
        with explained(TrainingError, what, remedy):
            write_bytes(path, serialise(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], run: dict[str, Any]) -> Checkpoint:
        """Read the checkpoint of `run`.

        Raises TrainingError when it is unreadable or of another run, naming what
        differs.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()[_METADATA])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            checkpoint = cls(**tensors, **about)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{path} is not a training checkpoint ({error}); start again without "
                "resuming"
            ) from error
        # Through JSON, as the saved one went: it knows no tuples.
        expected, saved = _flat(json.loads(json.dumps(run))), _flat(checkpoint.run)
        differing = [
            f"{key} {saved.get(key)!r} instead of {expected.get(key)!r}"
            for key in sorted({*expected, *saved})
            if saved.get(key) != expected.get(key)
        ]
        if differing:
            raise TrainingError(
                f"{path} belongs to another run: it has {', '.join(differing)}; give "
                "the same arguments, or start again without resuming"
            )
        return checkpoint


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, so that a message can name the very setting."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextmanager
def stopping_signals(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` at the first Ctrl-C or termination signal; a second acts at once.

    Does nothing outside the main thread, where Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        ask()

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
