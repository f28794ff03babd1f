"""One vLLM engine in a process of its own, driven by lines of JSON.

`engine_process` starts it (`python -m vllm_ppd.cli.engine_worker`) and describes the
conversation. Everything that vLLM and its own processes print goes to the log, so
standard output carries nothing but replies.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import time
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

STREAM_INTERVAL_S = 0.1
# Three engines take turns on one GPU, each holding its memory throughout.
GPU_MEMORY_SHARE = 0.28


def no_compiler() -> str | None:
    """What vLLM lacks to compile a model for CPU, or None.

    Without it the default (compiled) engine fails at start, so that eager mode is
    the better default.
    """
    compiler = os.environ.get("CXX") or "g++"
    if not shutil.which(compiler):
        return compiler
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h"
    return None


def sentence(error: BaseException) -> str:
    """The error's text; of pydantic's report only what a user needs."""
    details = getattr(error, "errors", None)
    if callable(details):
        texts = [str(item["msg"]).removeprefix("Value error, ") for item in details()]
        return "; ".join(texts)
    return str(error).strip() or type(error).__name__


class Engine:
    """A vLLM engine and the recording of what each of its steps brought."""

    def __init__(self, settings: dict[str, Any]):
        from vllm import LLM
        from vllm.platforms import current_platform

        options = dict(settings)
        self.notes = []
        if current_platform.is_cpu():
            lacking = no_compiler()
            if lacking and not options.get("enforce_eager"):
                options["enforce_eager"] = True
                self.notes.append(f"eager mode, as {lacking} is missing")
        else:
            options.setdefault("gpu_memory_utilization", GPU_MEMORY_SHARE)
        start = time.perf_counter()
        self.llm = LLM(**options)
        self.start_s = time.perf_counter() - start
        self.tokenizer = self.llm.get_tokenizer()
        self.requests = 0

    def card(self) -> dict[str, Any]:
        """What a reader of measurements wants to know of this engine."""
        import psutil
        import torch
        import vllm
        from vllm.platforms import current_platform

        config = self.llm.llm_engine.vllm_config
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        cpus = [process.cpu_affinity() for process in family]
        is_cpu = current_platform.is_cpu()
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "device": "cpu" if is_cpu else current_platform.get_device_name(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "eager": bool(config.model_config.enforce_eager),
            # The narrowest set is the worker's: vLLM binds it on CPU.
            "worker_cpus": min(cpus, key=lambda cpus: len(cpus)),
            "processes": len(family),
            "start_s": round(self.start_s, 1),
            "notes": self.notes,
        }

    def _split(self, ids: Sequence[int], text: str) -> tuple[str, str]:
        """A step's text as (accepted guesses, the token the model itself added)."""
        if len(ids) < 2:
            return "", text
        own = self.tokenizer.decode([ids[-1]])
        if own and text.endswith(own):
            return text[: -len(own)], own
        return text, ""

    def generate(
        self,
        prompts: list[list[int]],
        params: dict[str, Any],
        stream: bool = False,
        at_once: int | None = None,
        lengths: list[int] | None = None,
        send: Any = None,
    ) -> dict[str, Any]:
        """Run all prompts, `at_once` at a time: the next one when one has finished.

        The clock runs from before the first request is added to the last token, that
        of a request's steps from when it is added. The recording in between is a list
        append per request and step.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        each = [params] * len(prompts)
        if lengths is not None:
            each = [{**params, "max_tokens": length} for length in lengths]
        kind = RequestOutputKind.DELTA
        sampling = [SamplingParams(output_kind=kind, **one) for one in each]
        index = {str(self.requests + i): i for i in range(len(prompts))}
        self.requests += len(prompts)
        events: list[tuple[int, float, Sequence[int], str]] = []
        sent, steps = 0, 0
        start = last = time.perf_counter()
        added: list[float] = []
        waiting = zip(index, prompts, sampling, strict=True)

        def add_requests(count: int | None) -> None:
            for name, ids, wanted in islice(waiting, count):
                added.append(time.perf_counter())
                engine.add_request(name, {"prompt_token_ids": ids}, wanted)

        add_requests(at_once)
        # Until a request finishes that has nobody to follow it.
        full_until, full_events = start, 0
        while engine.has_unfinished_requests():
            all_added = len(added) == len(prompts)
            outputs = engine.step()
            now = time.perf_counter()
            steps += bool(outputs)
            finished = 0
            for output in outputs:
                new = output.outputs[0]
                place = index[output.request_id]
                events.append((place, now - added[place], new.token_ids, new.text))
                finished += output.finished
            if not full_events and finished and all_added:
                full_until, full_events = now, len(events)
            add_requests(finished)
            if stream and now - last > STREAM_INTERVAL_S:
                last = now
                send({"event": "progress", "steps": self._records(events[sent:])})
                sent = len(events)
        wall = time.perf_counter() - start
        # No conversion happens before the clock has stopped, unless streamed.
        records: list[list[Any]] = [[] for _ in prompts]
        for event in self._records(events):
            records[event[0]].append(event[1:])
        full_tokens = sum(len(event[2]) for event in events[:full_events])
        return {
            "wall_s": wall,
            "engine_steps": steps,
            "requests": records,
            "full": [full_until - start, full_tokens],
        }

    def _records(self, events: list[tuple[int, float, Sequence[int], str]]) -> list:
        return [
            [i, at, list(ids), *self._split(ids, text)] for i, at, ids, text in events
        ]

    def score(self, ids: list[int]) -> list[list[Any]]:
        """[token id, log probability, text] of the two likeliest next tokens."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2)
        output = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[
            0
        ]
        found = output.outputs[0].logprobs[0].items()
        ranked = sorted(found, key=lambda item: -item[1].logprob)[:2]
        return [[i, entry.logprob, self.tokenizer.decode([i])] for i, entry in ranked]


def serve(settings: dict[str, Any], commands: Any, send: Any) -> None:
    """Answer commands until `quit` or until the other side is gone."""
    import vllm  # noqa: F401
    from vllm.platforms import current_platform

    send({"event": "imported", "device": current_platform.device_type})
    engine: Engine | None = None
    for line in commands:
        message = json.loads(line)
        command = message.pop("command")
        if command == "quit":
            return
        if command == "start":
            engine = Engine(settings)
            send({"event": "ready", "card": engine.card()})
        elif engine is None:
            raise RuntimeError(f"{command} before start")
        elif command == "encode":
            ids = [engine.tokenizer.encode(text) for text in message["texts"]]
            send({"event": "ids", "ids": ids})
        elif command == "generate":
            send({"event": "done", **engine.generate(**message, send=send)})
        elif command == "score":
            send({"event": "scores", "top": engine.score(message["ids"])})
        elif command == "report":
            report = engine.llm.collective_rpc("ppd_report")[0]
            send({"event": "report", "report": report})
        elif command == "hold":
            engine.llm.collective_rpc("ppd_hold", args=(message["plan"],))
            send({"event": "held"})
        else:
            raise RuntimeError(f"unknown command {command}")


def main() -> int:
    # Descriptors made by dup are not inherited, so vLLM's processes can neither
    # write replies nor keep the pipes open.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        settings = json.loads(commands.readline() or "null")
        if settings is not None:
            serve(settings, commands, send)
    except BrokenPipeError:
        return 1
    except Exception as error:
        traceback.print_exc()
        invalid = isinstance(error, ValueError)
        send({"event": "error", "invalid": invalid, "message": sentence(error)})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
