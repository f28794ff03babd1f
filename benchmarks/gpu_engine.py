"""An engine in a process of its own that decodes random prompts and times its steps.

For `gpu_decode.py`. The engine runs as users run it, with vLLM's engine core in yet
another process. Only the far end imports vLLM.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from itertools import pairwise
from statistics import median
from typing import Any

# Replaying acceptance sends a function to the worker.
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class TimedEngine:
    """The near end.

    Args:
        settings: arguments of `vllm.LLM`.
        acceptance: [distance, rank] odds by which guesses are accepted, or None for
            the target's own verdict.
    """

    def __init__(
        self, settings: dict[str, Any], acceptance: list[list[float]] | None = None
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, settings, acceptance)
        )
        self._process.start()

    def wait_ready(self) -> dict[str, Any]:
        """Its card; raises RuntimeError with the reason if it did not start."""
        return self._receive()

    def decode(self, batch: int, context: int, tokens: int) -> dict[str, float]:
        """`batch` requests of `context` random tokens, `tokens` written by each."""
        self._pipe.send({"batch": batch, "context": context, "tokens": tokens})
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            ok, result = self._pipe.recv()
        except EOFError:
            raise RuntimeError("an engine's process ended") from None
        if not ok:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        # It leads a session: the group is its own processes, vLLM's included.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()


def _serve(pipe: Any, settings: dict[str, Any], acceptance: Any) -> None:
    os.setsid()
    os.environ.update(ENVIRONMENT)
    try:
        from vllm import LLM

        began = time.perf_counter()
        llm = LLM(**settings)
        if acceptance is not None:
            from replay import replay_acceptance_v2

            llm.collective_rpc(replay_acceptance_v2, args=(acceptance,))
        pipe.send((True, {"start_s": round(time.perf_counter() - began, 1)}))
        number = 0
        while (task := pipe.recv()) is not None:
            number += 1
            pipe.send((True, _decode(llm, number, **task)))
        llm.llm_engine.engine_core.shutdown()
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        pipe.send((False, f"{type(error).__name__}: {error}\n{text}"))


def _decode(
    llm: Any, number: int, batch: int, context: int, tokens: int
) -> dict[str, float]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    vocabulary = engine.model_config.get_vocab_size()
    params = SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=tokens,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    began = time.perf_counter()
    for index in range(batch):
        # Different prompts, so that no prefix is shared.
        seed = 31 * index + 1009 * number
        ids = [(7919 * (i + seed) + 13) % vocabulary for i in range(context)]
        prompt = TokensPrompt(prompt_token_ids=ids)
        engine.add_request(f"{number}-{index}", prompt, params)
    # When, of how many requests, how many tokens, and whether one was finished.
    events: list[tuple[float, int, int, bool]] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if outputs:
            new = sum(len(output.outputs[0].token_ids) for output in outputs)
            done = any(output.finished for output in outputs)
            events.append((now, len(outputs), new, done))
    wall = events[-1][0] - began
    # Steps of all requests together: after the prompts, before the first end.
    full = [i for i, event in enumerate(events) if event[1] == batch]
    ended = next(i for i, event in enumerate(events) if event[3])
    steady = [events[i] for i in full[1:] if i < ended] or events[-2:]
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(steady)]
    return {
        "tokens_per_s": sum(event[2] for event in events) / wall,
        "step_ms": 1000 * median(gaps or [wall]),
        "tokens_per_step": sum(e[2] for e in steady) / sum(e[1] for e in steady),
        "steps": len(events),
        "wall_s": wall,
    }
