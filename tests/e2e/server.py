"""`vllm serve`, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import MODEL
from tests.engine.engine_process import ROOT

VLLM = str(Path(sys.executable).with_name("vllm"))
START_SECONDS, STOP_SECONDS = 600, 60


class Server:
    """A server that has been started, and all that it starts.

    Its log lies in the folder; `before` is a command that starts what follows it.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        model: Any = MODEL,
        before: Any = (),
        **env: str,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url, self.log = f"http://127.0.0.1:{port}", folder / f"{port}.log"
        command = [*before, VLLM, "serve", str(model), "--served-model-name", "demo"]
        command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
        command += ["--host", "127.0.0.1", "--port", port, *flags]
        python_path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": python_path}
        # In a session of its own: Ctrl-C reaches the tests, which then stop it.
        how: Any = {"env": {**os.environ, **own, **env}, "start_new_session": True}
        with open(self.log, "w") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=log, **how)

    def wait(self) -> None:
        """Until it serves."""
        for _ in range(START_SECONDS):
            self.check()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def check(self) -> None:
        """Whether it lives."""
        assert self.process.poll() is None, self.log.read_text()[-4000:]

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def metrics(self) -> Counter[str]:
        """Counters and gauges of vLLM and PPD: sums over their labels."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        sums: Counter = Counter()
        for family in text_string_to_metric_families(text):
            for name, _, value, *_ in family.samples:
                if family.type != "histogram" and name.startswith("vllm:"):
                    sums[name.removeprefix("vllm:")] += value
        return sums

    def stop(self) -> None:
        with contextlib.suppress(psutil.Error):
            everything = self.processes()
            self.process.terminate()
            psutil.wait_procs(everything, STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(*arguments: Any, **more: Any) -> Iterator[Server]:
    """A server until the end of the block."""
    server = Server(*arguments, **more)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
