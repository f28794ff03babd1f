"""A device tensor on the host, some steps late, without ever waiting for it."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["HostCopy"]


class HostCopy:
    """Copies one tensor now and then; values arrive when the device gets to it.

    Args:
        source: whose values at the time of `start`, in stream order, are wanted.
    """

    def __init__(self, source: torch.Tensor):
        self._source = source
        on_gpu = source.device.type != "cpu"
        self._host = torch.empty(
            source.shape, dtype=source.dtype, device="cpu", pin_memory=on_gpu
        )
        self._values: np.ndarray = self._host.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None
        self._under_way = False

    def start(self) -> bool:
        """Begin a copy, unless one is under way still."""
        if self._under_way:
            return False
        self._host.copy_(self._source, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._under_way = True
        return True

    def take(self) -> np.ndarray | None:
        """A copy's values once they are there, and only once; else None."""
        if not self._under_way:
            return None
        if self._copied is not None and not self._copied.query():
            return None
        self._under_way = False
        return self._values.copy()
