"""vLLM engines in processes of their own, so that decoders can be compared.

Two engines in one process would share its interpreter, and their timings; here each
decoder has a process that sleeps while another is measured. The conversation with
`engine_worker` is one JSON object per line:

    to the worker                          from the worker
    {settings of vllm.LLM}                 {"event": "imported", "device"}
    {"command": "start"}                   {"event": "ready", "card"}
    {"command": "encode", "texts"}         {"event": "ids", "ids"}
    {"command": "generate", "prompts",     {"event": "progress", "steps"}, any number,
     "params", "stream", "at_once",         {"event": "done", "wall_s", "requests", ...}
     "lengths"}
    {"command": "score", "ids"}            {"event": "scores", "top"}
    {"command": "report"}                  {"event": "report", "report"}
    {"command": "hold", "plan"}            {"event": "held"}
    {"command": "quit"}
    (at any time)                          {"event": "error", "invalid", "message"}

A step of a request is [seconds, token ids, text of accepted guesses, other text].
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ppd.cli.generation import Batch, Generation

if TYPE_CHECKING:
    from vllm_ppd.trees.menu import TreePlan

__all__ = [
    "EngineFailedError",
    "EngineProcess",
    "engine_processes",
    "settle",
    "start_all",
]

# An idle vLLM worker on CPU polls for a second after its last step, on the very core
# that the next engine's worker is bound to.
SETTLE_S = 1.2
WORKER = (sys.executable, "-m", "vllm_ppd.cli.engine_worker")
START_TIMEOUT_S = 1800.0
QUIT_TIMEOUT_S = 15.0
TERMINATE_TIMEOUT_S = 3.0
_ERROR_LINE = re.compile(r"\b\w*(?:Error|Exception): .+")


class EngineFailedError(RuntimeError):
    """An engine that did not start or stopped; the message names its log."""


def engine_environment(in_process: bool) -> dict[str, str]:
    """The environment of an engine: the user's own, and defaults for what is unset."""
    defaults = {
        # Several engines share the machine; vLLM would give each half of it.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if in_process:
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}


class EngineProcess:
    """The near end of one engine.

    Args:
        name: for messages and the log's name.
        settings: arguments of `vllm.LLM`.
        log_folder: where `<name>.log` is written.
        in_process: keep vLLM's engine core in the same process as its front end.
        command: what to run; for tests.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        log_folder: Path,
        in_process: bool = False,
        command: Sequence[str] = WORKER,
    ):
        self.name = name
        self.log = log_folder / f"{name.replace(' ', '-')}.log"
        self.device = ""
        self.card: dict[str, Any] = {}
        self._busy = True
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we end the engine.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=engine_environment(in_process),
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()
        self._write(settings)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._busy = True
        # A dead engine is reported when its answer is awaited, with its reason.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _wait(
        self,
        event: str,
        timeout_s: float | None = None,
        on_progress: Callable[[list[Any]], None] | None = None,
    ) -> dict[str, Any]:
        while True:
            try:
                message = self._messages.get(timeout=timeout_s)
            except queue.Empty:
                raise EngineFailedError(
                    f"the engine of {self.name} gave no sign of life for "
                    f"{timeout_s:.0f} s; its log is {self.log}"
                ) from None
            if message is None:
                raise self._failure("it ended")
            if message["event"] == "error":
                if message["invalid"]:
                    raise ValueError(message["message"])
                raise self._failure(message["message"])
            if message["event"] == "progress" and on_progress is not None:
                on_progress(message["steps"])
            if message["event"] == event:
                self._busy = False
                return message

    def _failure(self, reason: str) -> EngineFailedError:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        # vLLM's processes report in turn, and the first to fail knows why.
        _, _, failed = text.partition("Traceback (most recent call last)")
        cause = _ERROR_LINE.search(failed)
        what = cause.group(0) if cause else reason.split("\n")[0]
        return EngineFailedError(
            f"the engine of {self.name} failed: {what[:300]}; its log is {self.log}"
        )

    def wait_imported(self) -> None:
        """Until vLLM is imported, the part of a start that needs nothing of ours."""
        self.device = self._wait("imported", START_TIMEOUT_S)["device"]

    def begin_start(self) -> None:
        self._write({"command": "start"})

    def wait_ready(self) -> None:
        """Until the engine can generate.

        Raises ValueError for what the settings got wrong, EngineFailedError else.
        """
        self.card = self._wait("ready", START_TIMEOUT_S)["card"]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's own begin-of-text token."""
        self._write({"command": "encode", "texts": list(texts)})
        return self._wait("ids")["ids"]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: dict[str, Any],
        on_progress: Callable[[list[Any]], None] | None = None,
        at_once: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Run the prompts and wait for the end.

        params: those of `vllm.SamplingParams`.
        at_once: most requests in the engine at a time (None: all of them); the next
            one comes when one has finished.
        lengths: most tokens of each request, instead of the one in `params`.
        on_progress: called about ten times a second with [request, *step] lists;
            without it the engine sends nothing until it has finished.
        """
        stream = on_progress is not None
        message = {
            "prompts": [list(p) for p in prompts],
            "params": params,
            "stream": stream,
            "at_once": at_once,
            "lengths": None if lengths is None else list(lengths),
        }
        self._write({"command": "generate", **message})
        done = self._wait("done", on_progress=on_progress)
        requests = tuple(Generation.of(records) for records in done["requests"])
        return Batch(
            done["wall_s"], done["engine_steps"], requests, tuple(done["full"])
        )

    def score(self, ids: Sequence[int]) -> list[tuple[int, float, str]]:
        """(id, log probability, text) of the two likeliest tokens after `ids`."""
        self._write({"command": "score", "ids": list(ids)})
        return [(i, p, text) for i, p, text in self._wait("scores")["top"]]

    def report(self) -> dict[str, Any]:
        """What PPD's trees do now, see `PPDRunnerMixin.ppd_report`."""
        self._write({"command": "report"})
        return self._wait("report")["report"]

    def hold(self, plan: TreePlan | None = None) -> None:
        """From now on PPD keeps to its trees, or to a plan's, whatever the traffic."""
        given = None if plan is None else plan.to_dict()
        self._write({"command": "hold", "plan": given})
        self._wait("held")

    def close(self) -> None:
        """End the engine and every process it started."""
        # An engine in the middle of something (Ctrl-C, a failure) reads no commands.
        if not self._busy:
            self._write({"command": "quit"})
            self._ended(QUIT_TIMEOUT_S)
        for signal_, grace_s in (
            (signal.SIGTERM, TERMINATE_TIMEOUT_S),
            (signal.SIGKILL, None),
        ):
            # A session of its own: the group holds the engine's processes, no others.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal_)
            self._ended(grace_s)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _ended(self, timeout_s: float | None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)


@contextlib.contextmanager
def engine_processes(
    settings: Mapping[str, Mapping[str, Any]], purpose: str, in_process: bool = False
) -> Iterator[dict[str, EngineProcess]]:
    """Engines by name, not yet started, that end with the block.

    Their logs stay only if an engine fails. `purpose` is part of their folder's name.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"vllm-ppd-{purpose}-"))
    engines: dict[str, EngineProcess] = {}
    keep = False
    try:
        for name, options in settings.items():
            engines[name] = EngineProcess(name, dict(options), folder, in_process)
        yield engines
    except EngineFailedError:
        keep = True
        raise
    finally:
        for engine in engines.values():
            engine.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def start_all(
    engines: Sequence[EngineProcess],
    say: Callable[[str], None] = lambda text: None,
    parallel: bool = False,
) -> None:
    """Bring engines up, one after the other unless `parallel` and on CPU.

    On a GPU each engine measures how much memory is free, so two must not start at
    the same time.
    """
    for engine in engines:
        engine.wait_imported()
    if parallel and all(engine.device == "cpu" for engine in engines):
        say(f"starting {' and '.join(engine.name for engine in engines)}")
        for engine in engines:
            engine.begin_start()
        # The last first: it speculates, so its settings are likelier to be refused.
        for engine in reversed(engines):
            engine.wait_ready()
        return
    for engine in engines:
        say(f"starting {engine.name}")
        engine.begin_start()
        engine.wait_ready()


def settle() -> None:
    """Wait until the engine that ran last is asleep."""
    time.sleep(SETTLE_S)
