"""Triton's kernels as tests run them: on the GPU, or else in Triton's interpreter.

The interpreter must be switched on before Triton is imported. It is off again
afterwards for processes that tests start.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from vllm_ppd.kernels.cpu.build import load_library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _import_triton() -> Any:
    """The folder of the kernels, or why Triton cannot be used."""
    if DEVICE == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import vllm_ppd.kernels.triton as folder
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
    return folder


kernels = _import_triton()
_missing = isinstance(kernels, str)
needs_triton = pytest.mark.skipif(_missing, reason=str(kernels))
needs_compiler = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
