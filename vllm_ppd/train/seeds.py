"""Seeds for parts of a run."""

from __future__ import annotations

import hashlib

__all__ = ["mixed_seed"]


def mixed_seed(*parts: int | str) -> int:
    """A seed from several numbers or words, alike on every platform and Python."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
