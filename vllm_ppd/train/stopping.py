"""Stop between steps, not inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["stopping_signals"]


@contextmanager
def stopping_signals(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` at the first Ctrl-C or termination signal; a second acts at once.

    Does nothing outside the main thread, where Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        ask()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
