"""What the demo lets the models continue: excerpts of held-out text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

MAX_CHARACTERS = 700
# A function's or class's head: something that asks to be continued.
_HEAD = re.compile(r"^[ \t]*(?:async def|def|class) .*:[ \t]*$", re.M)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file of lines {"text": ...}.

    Raises ValueError, one sentence with the file and line, for anything else.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise ValueError(
                        f'line {number} of {path} is no JSON object {{"text": "..."}}'
                    )
                yield text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the texts in {path} cannot be read: {error}") from error


def excerpt(text: str) -> str | None:
    """A passage from inside the text that ends where a model can go on.

    Code ends after the head of a function or class, other text at a line's end, and
    without the line's break, which many tokenizers join with what follows. None for a
    text too short. The beginning is skipped: it is often a licence notice.
    """
    earliest = max(len(text) // 4, min(300, len(text) // 2))
    head = _HEAD.search(text, earliest)
    end = head.end() if head else text.find("\n", earliest)
    if end < 80:
        return None
    start = max(0, end - MAX_CHARACTERS)
    # Begin with a whole line.
    start = text.find("\n", start, end) + 1 if start else 0
    return text[start:end].rstrip()


def excerpts(path: Path, count: int) -> list[str]:
    """One excerpt each of `count` texts, spread over the file.

    Raises ValueError when the file is unusable or holds too few texts.
    """
    found = [part for text in read_texts(path) if (part := excerpt(text)) is not None]
    if len(found) < count:
        raise ValueError(
            f"{path} has {len(found)} texts long enough for a prompt, and {count} are "
            "asked for; lower --num-prompts"
        )
    return [found[i * len(found) // count] for i in range(count)]
