"""Training text that the frozen model writes itself, kept in a file as it grows.

Prompt tokens predict the model's own output, whose distributions are sharper than those
in other text. Pieces of the data are prompts, the model continues them by sampling, and
insertions take place in the continuations only.

Every batch has its own seed, so batches can be written by several processes, and by a
run that was stopped and started again, with the same result. A process appends its
batches to one file, a line each; a line that a kill cut short is written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_ppd.train.continuation import continue_prompts
from vllm_ppd.train.data import TokenStream, mixed_seed, prompt_starts
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.settings import Distillation, TrainingError

__all__ = ["SelfDistillation"]

FORMAT = "ppd_self_distillation"
FORMAT_VERSION = 1

Batch = tuple[int, list[list[int]]]
"""Number of a batch, and the token ids of its sequences, prompts included."""


@dataclasses.dataclass(frozen=True, eq=False)
class SelfDistillation:
    """What is to be written, and where it is kept."""

    model: FrozenModel
    prompts: TokenStream
    """The data, of which pieces are continued."""
    settings: Distillation
    length: int
    """Tokens of a sequence, its prompt included."""
    seed: int
    folder: Path
    run_id: dict[str, Any]
    """Model, data and whatever else makes another text."""
    process: int = 0
    processes: int = 1
    quiet: bool = True

    def stream(
        self, gather: Callable[[list[Batch]], list[Batch]] = lambda own: own
    ) -> TokenStream:
        """All sequences, with insertions allowed in the model's own words.

        `gather` collects the batches of all processes. Raises TrainingError when the
        data have too few prompts, or the file cannot be read or written.
        """
        batches = sorted(gather(list(self._own_batches())))
        tokens, allowed = [], []
        for _, sequences in batches:
            for ids in sequences:
                written = torch.ones(len(ids), dtype=torch.bool)
                written[: self.settings.prompt_length] = False
                tokens.append(torch.tensor(ids, dtype=torch.int32))
                allowed.append(written)
        return TokenStream(torch.cat(tokens), torch.cat(allowed))

    @property
    def file(self) -> Path:
        """This process's file; another model, text or setting is another file."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        part = f"-{self.process + 1}-of-{self.processes}" if self.processes > 1 else ""
        return self.folder / f"self-distilled-{digest.hexdigest()[:8]}{part}.jsonl"

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": dataclasses.asdict(self.settings),
            "length": self.length,
            "seed": self.seed,
            "processes": self.processes,
            "run": self.run_id,
        }

    def _own_batches(self) -> Iterator[Batch]:
        starts = self._starts()
        own = list(enumerate(starts.split(self.settings.batch_size)))[
            self.process :: self.processes
        ]
        try:
            done, size = self._read()
            yield from zip([number for number, _ in own], done, strict=False)
            if len(done) >= len(own):
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.file, "r+b" if size else "wb") as file:
                # A line that was cut short goes.
                file.truncate(size)
                file.seek(size)
                if not size:
                    file.write(json.dumps(self._header()).encode() + b"\n")
                with self._bar(own, len(done)) as bar:
                    for number, part in own[len(done) :]:
                        sequences = self._write(number, part)
                        file.write(json.dumps(sequences).encode() + b"\n")
                        file.flush()
                        bar.update(sum(map(len, sequences)))
                        yield number, sequences
        except OSError as error:
            raise TrainingError(
                f"{self.file} cannot be read or written: {error.strerror}"
            ) from error

    def _starts(self) -> torch.Tensor:
        """int64 [continuations]: where prompts start, in an order of the seed's."""
        count = self.settings.continuations
        starts = prompt_starts(self.prompts, self.settings.prompt_length)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, "prompts"))
        order = torch.randperm(starts.numel(), generator=generator)
        if self.settings.temperature == 0 and count > starts.numel():
            raise TrainingError(
                f"the data have {starts.numel()} prompts of "
                f"{self.settings.prompt_length} tokens, and greedy decoding continues "
                f"each in one way only; expected at least {count}: use more text, "
                "fewer continuations or a temperature above 0"
            )
        return starts[order[torch.arange(count) % starts.numel()]]

    def _write(self, number: int, starts: torch.Tensor) -> list[list[int]]:
        prompts, _ = self.prompts.windows(starts, self.settings.prompt_length)
        generator = torch.Generator().manual_seed(
            mixed_seed(self.seed, "continuations", number)
        )
        continuation = continue_prompts(
            self.model,
            prompts,
            self.length - self.settings.prompt_length,
            self.settings.temperature,
            generator,
        )
        lengths = self.settings.prompt_length + continuation.written.sum(dim=1)
        pairs = zip(continuation.tokens.tolist(), lengths.tolist(), strict=True)
        return [ids[:length] for ids, length in pairs]

    def _read(self) -> tuple[list[list[list[int]]], int]:
        """Finished batches of the file, and the bytes that they and the header take."""
        if not self.file.exists():
            return [], 0
        batches, size = [], 0
        with open(self.file, "rb") as file:
            for index, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    content = json.loads(line)
                except ValueError as error:
                    raise TrainingError(
                        f"{self.file}, line {index + 1} is damaged ({error}); remove "
                        "the file"
                    ) from error
                if index == 0 and content != json.loads(json.dumps(self._header())):
                    raise TrainingError(
                        f"{self.file} is not the text that this run would write; "
                        "remove it"
                    )
                size += len(line)
                batches += [content] if index else []
        return batches, size

    def _bar(self, own: list[tuple[int, torch.Tensor]], done: int) -> tqdm:
        count = sum(part.numel() for _, part in own)
        finished = sum(part.numel() for _, part in own[:done])
        return tqdm(
            total=count * self.length,
            initial=finished * self.length,
            unit="tok",
            unit_scale=True,
            desc="self-distilling",
            disable=self.quiet,
        )
