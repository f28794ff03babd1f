"""Requests on a vLLM engine: one with tokens and time of each step, or many at once.

vLLM is imported where an engine starts: whoever only reads results does without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """The tokens of one request from one engine step."""

    at_s: float
    """Seconds since the request was added."""
    ids: tuple[int, ...]
    drafted: str
    """Text of the accepted draft tokens."""
    own: str
    """Text of the last token, which the model chose in this step."""


@dataclass(frozen=True)
class Generation:
    """The tokens of one request, step by step; steps without tokens are left out."""

    steps: tuple[Step, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for step in self.steps for i in step.ids)

    @property
    def text(self) -> str:
        return "".join(step.drafted + step.own for step in self.steps)

    @property
    def seconds(self) -> float:
        """From the start of the request to its last token."""
        return self.steps[-1].at_s if self.steps else 0.0

    @property
    def tokens_per_s(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per decode step; the first step, which reads the prompt, is left
        out."""
        steps = len(self.steps) - 1
        return (len(self.ids) - len(self.steps[0].ids)) / steps if steps > 0 else 1.0

    @property
    def repeated(self) -> float:
        """Share of the 4-grams that occurred in the text before; 1 for a long loop."""
        ids = self.ids
        grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Engine:
    """A vLLM engine, in its own process. Methods take and return picklable values.

    Whatever vLLM and its own processes print goes to the log.

    Args:
        settings: of `vllm.LLM`.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.num_requests = settings, 0
        self.llm: Any = None

    def start(self) -> str:
        """Start vLLM, once; returns the data type."""
        from vllm import LLM

        if self.llm is None:
            self.llm = LLM(**self.settings)
        self.tokenizer = self.llm.get_tokenizer()
        dtype = self.llm.llm_engine.vllm_config.model_config.dtype
        return str(dtype).removeprefix("torch.")

    def encode(self, texts: list[str], whole: bool = False) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's own begin-of-text token unless
        the text is `whole`."""
        encode = self.tokenizer.encode
        return [encode(text, add_special_tokens=not whole) for text in texts]

    def encode_questions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as a user's message in the chat template."""
        chats = [[{"role": "user", "content": text}] for text in texts]
        render = self.tokenizer.apply_chat_template
        return self.encode(
            render(chats, tokenize=False, add_generation_prompt=True), True
        )

    def generate(self, prompt: list[int], params: dict[str, Any]) -> Generation:
        """Run one request to its end; params are those of `vllm.SamplingParams`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        sampling = SamplingParams(output_kind=RequestOutputKind.DELTA, **params)
        self.num_requests += 1
        records: list[tuple[float, Any]] = []
        start = time.perf_counter()
        name = f"request-{self.num_requests}"
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            records += [(now, output.outputs[0]) for output in outputs]
        return Generation(
            tuple(
                Step(at_s, tuple(new.token_ids), *self._split(new.token_ids, new.text))
                for at_s, new in records
                if new.token_ids
            )
        )

    def complete(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]
    ) -> list[tuple[tuple[int, ...], str]]:
        """Token ids and texts of answers to prompts, which run together."""
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": each} for each in prompts]
        sampling = [SamplingParams(**each) for each in params]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [(tuple(o.outputs[0].token_ids), o.outputs[0].text) for o in outputs]

    def accepted(self) -> int:
        """Draft tokens that were accepted so far."""
        name = "vllm:spec_decode_num_accepted_tokens"
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def _split(self, ids: Sequence[int], text: str) -> tuple[str, str]:
        """A step's text as (accepted draft tokens, the model's own token)."""
        if len(ids) < 2:
            return "", text
        own = self.tokenizer.decode([ids[-1]])
        if own and text.endswith(own):
            return text[: -len(own)], own
        return text, ""

    def report(self) -> dict[str, Any]:
        """The answer of PPD's first worker to `ppd_report`."""
        return self.llm.collective_rpc("ppd_report")[0]
