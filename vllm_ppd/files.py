"""Write a file completely or not at all.

The content goes to a temporary name in the same folder, reaches the disk, and is
renamed over the target in one step, so that a reader, a full disk or a kill never
meets half a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["write_bytes", "write_json"]


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace `path` by `content` atomically; the folder must exist.

    Raises OSError (disk full, no permission) and then leaves no trace.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
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


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Replace `path` by `content` as indented JSON; refuses NaN and infinity.

    Raises ValueError for values that JSON cannot hold, OSError as `write_bytes`.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())
