"""Documents and chats in text files, located without holding them in memory.

Files ending in .jsonl hold one JSON object a line: {"text": ...}, or {"messages":
[{"role": ..., "content": ...}, ...]}, or a chat as ShareGPT has it, {"conversations":
[{"from": ..., "value": ...}, ...]}, or a prompt without an answer, {"prompt": ...} or
{"turns": [...]}. Any other file is plain text, cut at line ends into documents of some
64 kB.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_ppd
from vllm_ppd.files import explained
from vllm_ppd.train.settings import TrainingError

RENDERED = "rendered"
"""Role of what the chat template made of all messages before the model's answer."""
_PLAIN_BYTES = 1 << 16
# Names of the two speakers in ShareGPT's data, the paper's training text.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Document:
    """A stretch of a file."""

    path: Path
    offset: int
    """Bytes before it."""
    size: int
    """Bytes."""
    line: int
    """Number of its first line, from 1."""

    def read(self) -> str | list[dict[str, Any]]:
        """Its text, or its chat messages. Raises TrainingError with file and line."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            encoded = file.read(self.size)
        try:
            text = encoded.decode()
            if self.path.suffix != ".jsonl":
                return text
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TrainingError(
                f"{self.place} cannot be read ({error}); expected UTF-8 text, and in "
                ".jsonl files one JSON object on every line"
            ) from error
        content = content_of(record) if isinstance(record, dict) else None
        if content is None:
            raise TrainingError(
                f'{self.place} has neither "text" (a string) nor "messages" (a list of '
                'objects with a role), nor "prompt"; expected one of them on every line'
            )
        return content

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}"


def content_of(record: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
    """The text or chat messages of a row; None when it has neither."""
    if isinstance(record.get("text"), str):
        return record["text"]
    messages = record.get("messages")
    if _has_strings(messages, "role"):
        return messages
    turns: Any = record.get("conversations")
    if not (_has_strings(turns, "from") and _has_strings(turns, "value")):
        # Of several turns without answers, the first.
        prompt = record.get("prompt", record.get("turns"))
        prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
        known = isinstance(prompt, str)
        return [{"role": "user", "content": prompt}] if known else None
    messages = [
        {"role": _SHAREGPT_ROLES.get(t["from"], t["from"]), "content": t["value"]}
        for t in turns
    ]
    # Long chats are cut in ShareGPT; templates want the user first.
    start = 1 if messages and messages[0]["role"] == "assistant" else 0
    return messages[start:]


def _has_strings(turns: Any, key: str) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get(key), str) for turn in turns
    )


def find_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Documents of a file, in order; blank lines of .jsonl are passed over.

    Raises TrainingError when it cannot be read or holds nothing.
    """
    path = Path(path)
    if path.is_dir():
        raise TrainingError(f"{path} is a folder; expected a .jsonl or text file")
    with _reading(path), open(path, "rb") as file:
        pieces = _lines(file) if path.suffix == ".jsonl" else _blocks(file)
        documents = [Document(path, *piece) for piece in pieces]
    if not documents:
        raise TrainingError(f"{path} holds no text; expected at least one document")
    return documents


def _reading(path: Path) -> AbstractContextManager[None]:
    return explained(TrainingError, f"{path} cannot be read", "check the path")


def sha256_of_files(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """File name (without folders) -> sha256 of its bytes. Raises TrainingError.

    Later files of one name are numbered: "text.jsonl (2)".
    """
    hashes: dict[str, str] = {}
    for path in map(Path, paths):
        with _reading(path), open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        same = sum(name.split(" (")[0] == path.name for name in hashes)
        hashes[f"{path.name} ({same + 1})" if same else path.name] = digest
    return hashes


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages, of this project and of Python, for records of runs."""
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "vllm_ppd": vllm_ppd.__version__,
        "python": platform.python_version(),
    }


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, int, int]]:
    """(offset, size, line number) of every line that is not blank."""
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield offset, len(line), number
        offset += len(line)


def _blocks(file: Iterable[bytes]) -> Iterator[tuple[int, int, int]]:
    """As `_lines`, lines joined up to `_PLAIN_BYTES` bytes."""
    start = None
    for offset, size, number in _lines(file):
        if start is None:
            start, first = offset, number
        end = offset + size
        if end - start >= _PLAIN_BYTES:
            yield start, end - start, first
            start = None
    if start is not None:
        yield start, end - start, first


def render_chat(
    messages: list[dict[str, Any]], tokenizer: Any, *, answer_next: bool = False
) -> tuple[str, list[tuple[int, int]]] | None:
    """The conversation as the tokenizer's chat template has it, and assistant spans.

    A span is (first, last + 1) in characters: what the model writes in that turn, its
    end-of-turn mark included. None when the template rewrites earlier turns as a
    conversation grows (some drop the reasoning), so that spans cannot be told. With
    `answer_next` the text ends where the model's next answer begins. Raises
    TrainingError without a chat template or when the template refuses the messages.
    """
    if messages and messages[0]["role"] == RENDERED:
        text = "".join(message["content"] for message in messages)
        return text, [(len(messages[0]["content"]), len(text))]
    if getattr(tokenizer, "chat_template", None) is None:
        raise TrainingError(
            "the data has chat messages, but this model's tokenizer has no chat "
            'template; use {"text": ...} lines or a chat model'
        )
    render = tokenizer.apply_chat_template
    try:
        text = render(messages, tokenize=False, add_generation_prompt=answer_next)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(
                messages[:index], tokenize=False, add_generation_prompt=True
            )
            after = render(messages[: index + 1], tokenize=False)
            if not (after.startswith(prompt) and text.startswith(after)):
                return None
            spans.append((len(prompt), len(after)))
    # Templates are code: jinja2 and Python errors of any type come out of them.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the chat template refuses the messages ({reason}); use others, or "
            '{"text": ...} lines'
        ) from error
    return text, spans
