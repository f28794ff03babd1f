from __future__ import annotations

import pytest

from tests.kernels.implementations import DEVICE


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton imports parts of itself late, which must find the interpreter on."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
