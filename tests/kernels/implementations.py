"""Which implementations of a kernel a test runs: the reference, and Triton's.

Without a GPU, Triton kernels run in Triton's interpreter, which must be switched on
before Triton is imported. It is off again afterwards for processes that tests start.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _import_triton() -> str | None:
    """Why Triton cannot be used, or None."""
    if DEVICE == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import vllm_ppd.kernels.triton.fill_tree
        import vllm_ppd.kernels.triton.kv_compact
        import vllm_ppd.kernels.triton.ngram
        import vllm_ppd.kernels.triton.place_tree
        import vllm_ppd.kernels.triton.tree_attention
        import vllm_ppd.kernels.triton.tree_walk  # noqa: F401
    except ImportError as error:
        return f"needs triton (pip install triton): {error}"
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
    return None


_REASON = _import_triton()
needs_triton = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_triton)]
