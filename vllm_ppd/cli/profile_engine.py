"""The engine that `vllm-ppd profile` starts: it measures, files and ends."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_ppd.cli.engines import EngineProcess
    from vllm_ppd.search.latency import LatencyProfile

__all__ = ["measure", "on_file", "start_once"]

# What the bar of engine/measure_grid.py writes.
_MEASURED = re.compile(r"PPD measures steps[^\r\n]*?(\d+)/(\d+) ")
_POLL_S = 0.3


def on_file(file: Path, key: dict[str, Any], console: Console) -> LatencyProfile | None:
    """The profile that is filed, None where there is no usable one."""
    from vllm_ppd.search.latency import LatencyProfile, MeasurementError

    if not file.exists():
        return None
    try:
        return LatencyProfile.load(file, key)
    except MeasurementError as error:
        console.print(f"Measuring again: {error}.", style="yellow", soft_wrap=True)
        return None


def measure(
    settings: dict[str, Any],
    key: dict[str, Any],
    file: Path,
    show: Callable[..., None],
) -> LatencyProfile:
    """Start an engine that has no profile, and read what it files.

    A profile that is there already is replaced, or stays if the engine fails. Raises
    ValueError and EngineFailedError as the engine does.
    """
    from vllm_ppd.cli.engines import EngineFailedError
    from vllm_ppd.search.latency import LatencyProfile

    with _out_of_the_way(file):
        show("starting the engine")
        start_once(settings, show)
        if not file.exists():
            raise EngineFailedError(
                f"the engine started but filed no profile at {file}; is that folder "
                "writable?"
            )
        return LatencyProfile.load(file, key)


@contextlib.contextmanager
def _out_of_the_way(file: Path) -> Iterator[None]:
    """While the block runs `file` is not there; it comes back if the block fails."""
    aside = file.with_name(file.name + ".before")
    had = file.exists()
    if had:
        os.replace(file, aside)
    try:
        yield
    except BaseException:
        if had:
            os.replace(aside, file)
        raise
    if had:
        aside.unlink()


def start_once(settings: dict[str, Any], show: Callable[..., None]) -> None:
    """Start an engine and end it; its log stays only if it fails."""
    from vllm_ppd.cli.engines import engine_processes

    with engine_processes({"profiling": settings}, "profile") as engines:
        engine = engines["profiling"]
        with _watched(engine, show):
            engine.wait_imported()
            engine.begin_start()
            engine.wait_ready()


@contextlib.contextmanager
def _watched(engine: EngineProcess, show: Callable[..., None]) -> Iterator[None]:
    """Show how far the engine has got, by what it logs."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_POLL_S):
            with contextlib.suppress(OSError):
                found = _MEASURED.findall(engine.log.read_text(errors="replace"))
                if found:
                    done, total = map(int, found[-1])
                    show("measuring steps", done, total)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
