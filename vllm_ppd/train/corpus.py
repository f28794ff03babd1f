"""What a user gives as text, as files: data sets are copied into files first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm_ppd.train.datasets import DatasetName, copy_dataset

__all__ = ["DATA_FOLDER", "text_files"]

DATA_FOLDER = "data"
"""Where copies lie in a run's folder."""
# A token of most text is 3 to 5 bytes; beyond that a copy would go unread.
_BYTES_PER_TOKEN = 8


def text_files(
    sources: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    max_tokens: int,
    seed: int = 0,
    quiet: bool = True,
) -> list[Path]:
    """Files of `sources`, each a file or a data set; copies of the latter go to
    `folder`, up to what `max_tokens` can take. Raises DataError.
    """
    files = []
    for source in sources:
        name = DatasetName.parse(source)
        files.append(
            Path(source)
            if name is None
            else copy_dataset(
                name,
                folder,
                max_bytes=_BYTES_PER_TOKEN * max_tokens,
                seed=seed,
                quiet=quiet,
            )
        )
    return files
