"""Files of this project: written completely or not at all, read strictly.

Written content goes to a temporary name in the same folder, reaches the disk, and is
renamed over the target in one step, so that a reader, a full disk or a kill never
meets half a file.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` at the end of the block.

    The folder must exist. Whatever the block raises, or OSError (disk full, no
    permission), then leaves no trace.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a checkpoint should follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace `path` by `content` atomically; the folder must exist. Raises OSError."""
    with replacing(path) as file:
        file.write(content)


def write_json(
    path: str | os.PathLike[str], content: Any, indent: int | None = 2
) -> None:
    """Replace `path` by `content` as JSON; refuses NaN and infinity.

    Raises ValueError for values that JSON cannot hold, OSError as `write_bytes`.
    """
    text = json.dumps(content, indent=indent, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def explained(kind: type[ValueError], what: str, remedy: str) -> Iterator[None]:
    """A block whose OSError becomes an error of this kind: what failed, why, remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror}; {remedy}") from error


class FormatError(ValueError):
    """A file of this project's formats that cannot be read, written or used."""


def read_object(path: str | os.PathLike[str], kind: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; arguments and errors are those of `read_json`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{kind} {path} cannot be read as JSON ({error}); {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise FormatError(f"{kind} {path} is no JSON object; {remedy}")
    return content


def read_json(
    path: str | os.PathLike[str], *, kind: str, remedy: str, **expected: Any
) -> dict[str, Any]:
    """The content of a JSON file of ours, read strictly.

    Args:
        path: the file.
        kind: what it is, for messages: "the tree menu".
        remedy: what the user can do about a bad file.
        expected: see `check_content`.

    Raises:
        FormatError: one sentence that names the file, the fault and the remedy.
    """
    content = read_object(path, kind, remedy)
    try:
        return check_content(content, kind=kind, **expected)
    except FormatError as error:
        raise FormatError(f"{path}: {error}; {remedy}") from error


def check_content(
    content: Any,
    *,
    kind: str,
    format: str,
    version: int,
    keys: Collection[str],
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """The values of `keys` and `optional` in a JSON value of ours; raises FormatError.

    Args:
        content: the value.
        kind: what it is, for messages.
        format, version: what its keys "format" and "format_version" must say.
        keys, optional: all other keys that it must have, and may have.
    """
    if not isinstance(content, dict) or content.get("format") != format:
        what = content.get("format") if isinstance(content, dict) else type(content)
        raise FormatError(
            f"it is not {kind}: expected an object with format {format!r}, not {what!r}"
        )
    own_version = content.get("format_version")
    if type(own_version) is not int or own_version != version:
        raise FormatError(
            f"format_version is {own_version!r}; this release reads version {version}"
        )
    values = {
        key: value
        for key, value in content.items()
        if key not in ("format", "format_version")
    }
    check_keys(values, keys, optional)
    return values


def check_keys(
    values: Any, keys: Collection[str], optional: Collection[str] = ()
) -> None:
    """Raise FormatError for no object, an unknown key, and a missing one of `keys`."""
    if not isinstance(values, Mapping):
        raise FormatError(f"it must be an object, not {type(values).__name__}")
    allowed = [*keys, *optional]
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected {allowed}"
            raise FormatError(f"unknown key {key!r}; {hint}")
    for key in keys:
        if key not in values:
            raise FormatError(f"the key {key!r} is missing")
