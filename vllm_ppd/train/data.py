"""Training text as one stream of tokens, and the batches that are drawn from it.

Documents are shuffled (seeded), tokenised, closed with the end-of-text token and
packed, so that no row of a batch is wasted on padding. In chats, insertions are
allowed in the assistant's turns only: nothing else is ever decoded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from vllm_ppd.train.datasets import DatasetName, copy_dataset
from vllm_ppd.train.documents import Document, find_documents, render_chat
from vllm_ppd.train.insertion import Insertion, sample_insertion
from vllm_ppd.train.settings import TrainingError, TrainSettings

DATA_FOLDER = "data"
"""Folder of a run for copies of data sets and self-distilled text."""
_DOCUMENTS_AT_ONCE = 256
# `TokenStream.deal` cuts text into at least so many pieces, of so many tokens each.
_PIECES, _SHORT_PIECE, _PIECE = 32, 512, 8192
# A token is 3 to 5 bytes in nearly all text; a longer copy would go unread.
_BYTES_PER_TOKEN = 8


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Packed documents."""

    tokens: torch.Tensor
    """int32 [N]."""
    allowed: torch.Tensor | None = None
    """bool [N]: where insertions may take place; None is everywhere."""

    def windows(
        self, starts: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 [batch, length], and where insertions may take place."""
        index = starts[:, None] + torch.arange(length)
        everywhere = torch.ones_like(index, dtype=torch.bool)
        allowed = everywhere if self.allowed is None else self.allowed[index]
        return self.tokens[index].long(), allowed

    def split(self, size: int) -> tuple[TokenStream, TokenStream]:
        """Everything but the last `size` tokens, and those."""
        cut = self.tokens.numel() - size
        return self._part(slice(0, cut)), self._part(slice(cut, None))

    def deal(self, size: int) -> tuple[TokenStream, TokenStream]:
        """Everything but about `size` tokens, and those, taken in pieces from all over:
        files are often in an order, and one end of it is not like the other."""
        total = self.tokens.numel()
        piece = max(1, min(_PIECE, max(_SHORT_PIECE, total // _PIECES), size))
        number = torch.arange(total) // piece
        # The next piece is taken as soon as that makes no more than its share.
        taken = (number + 1) * size // total > number * size // total
        return self._part(~taken), self._part(taken)

    def _part(self, part: slice | torch.Tensor) -> TokenStream:
        allowed = None if self.allowed is None else self.allowed[part]
        return TokenStream(self.tokens[part], allowed)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model folder. Raises TrainingError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    # Besides OSError and ValueError, missing packages and the tokenizers library's own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"{os.fspath(folder)!r} has no usable tokenizer ({reason}); expected its "
            "files beside the model's"
        ) from error


def read_stream(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    max_tokens: int,
    least_tokens: int,
    seed: int = 0,
    quiet: bool = True,
) -> TokenStream:
    """Tokenise files until they end or `max_tokens` are reached.

    Raises TrainingError for unreadable, empty or malformed files, for chats that the
    tokenizer cannot render, and when fewer than `least_tokens` come out.
    """
    documents = [document for path in paths for document in find_documents(path)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    tokens: list[torch.Tensor] = []
    flags: list[torch.Tensor] = []
    total, chats = 0, False
    with tqdm(desc="tokenising", unit="tok", unit_scale=True, disable=quiet) as bar:
        for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
            batch = [documents[i] for i in order[start : start + _DOCUMENTS_AT_ONCE]]
            for ids, allowed in _tokenise(batch, tokenizer):
                tokens.append(torch.tensor(ids, dtype=torch.int32))
                flags.append(torch.ones(len(ids), dtype=torch.bool))
                if allowed is not None:
                    flags[-1] = torch.tensor(allowed, dtype=torch.bool)
                    chats = True
                total += len(ids)
                bar.update(len(ids))
            if total >= max_tokens:
                break
    if total < least_tokens:
        raise TrainingError(
            f"{', '.join(map(str, paths))} gives {total} tokens; expected at least "
            f"{least_tokens}: use more text or a smaller length"
        )
    return TokenStream(
        torch.cat(tokens)[:max_tokens],
        torch.cat(flags)[:max_tokens] if chats else None,
    )


def prompt_starts(stream: TokenStream, length: int) -> torch.Tensor:
    """int64 [count]: starts of all prompts, not overlapping each other.

    In chats a prompt ends where the assistant goes on writing. Raises TrainingError
    for text without a prompt.
    """
    last = stream.tokens.numel() - length
    if stream.allowed is None:
        starts = torch.arange(0, last + 1, length) if last >= 0 else torch.arange(0)
    else:
        # Token start + length is the first that the model writes.
        usable = stream.allowed[length:].nonzero()[:, 0]
        picked, at = [], 0
        while at < usable.numel():
            picked.append(int(usable[at]))
            at = int(torch.searchsorted(usable, picked[-1] + length))
        starts = torch.tensor(picked, dtype=torch.long)
    if starts.numel() == 0:
        raise TrainingError(
            f"the text of {stream.tokens.numel()} tokens has no prompt of {length} "
            "tokens to continue; use more text or a smaller prompt length"
        )
    return starts


def _tokenise(
    documents: list[Document], tokenizer: Any
) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Token ids of each document, and for a chat which of them the assistant wrote;
    chats come last."""
    texts: list[str] = []
    chats: list[tuple[str, list[tuple[int, int]]]] = []
    for document in documents:
        content = document.read()
        if isinstance(content, str):
            texts.append(content)
            continue
        try:
            rendered = render_chat(content, tokenizer)
        except TrainingError as error:
            raise TrainingError(f"{document.place}: {error}") from error
        if rendered is not None:
            chats.append(rendered)
    if texts:
        # Without the warning about texts longer than the model: windows are cut later.
        batch = tokenizer(texts, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        for ids in batch:
            closed = end is None or (ids and ids[-1] == end)
            yield (ids if closed else [*ids, end]), None
    for text, spans in chats:
        # The template writes the special tokens itself.
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        allowed = [
            any(first <= start and end <= last for first, last in spans)
            for start, end in encoded["offset_mapping"]
        ]
        yield encoded["input_ids"], allowed


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that run through the frozen model once."""

    ids: torch.Tensor
    """int64 [batch, T]."""
    insertions: tuple[Insertion, ...]
    """One per update, each drawn by itself."""

    @classmethod
    def draw(
        cls, stream: TokenStream, settings: TrainSettings, number: int, process: int
    ) -> Batch:
        """Batch `number` of `process`, on the CPU; the same at every call.

        Raises TrainingError when the text allows no insertion.
        """
        # A seed that is alike on every platform and Python.
        parts = f"{settings.seed}/{number}/{process}"
        digest = hashlib.sha256(parts.encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        last = stream.tokens.numel() - settings.length
        # In chats a whole batch may be the user's words; draw again then.
        for _ in range(100):
            size = (settings.batch_size,)
            starts = torch.randint(last + 1, size, generator=generator)
            ids, allowed = stream.windows(starts, settings.length)
            insertions = tuple(
                sample_insertion(
                    allowed,
                    settings.points,
                    settings.num_prompt_tokens,
                    settings.num_ept,
                    generator,
                )
                for _ in range(settings.updates)
            )
            # A sequence with any place for a point has one in every insertion.
            if bool(insertions[0].valid.any()):
                return cls(ids, insertions)
        raise TrainingError(
            f"no window of {settings.length} tokens has "
            f"{settings.num_prompt_tokens + 1} tokens of the assistant in a row; use "
            "data with longer answers"
        )

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.ids.to(device), tuple(part.to(device) for part in self.insertions)
        )


def text_files(
    sources: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    max_tokens: int,
    seed: int = 0,
    quiet: bool = True,
) -> list[Path]:
    """Files of `sources`, each a file or a data set; copies of the latter go to
    `folder`, up to what `max_tokens` can take. Raises TrainingError.
    """
    files = []
    for source in sources:
        name, size = DatasetName.parse(source), _BYTES_PER_TOKEN * max_tokens
        if name is None:
            files.append(Path(source))
        else:
            copy = copy_dataset(name, folder, max_bytes=size, seed=seed, quiet=quiet)
            files.append(copy)
    return files
