"""Compile the C++ kernels of this folder at first use, once per machine.

torch's own compiler driver does it: it picks the compiler and the flags for the
machine's vector ISA, caches by source and command line, locks against concurrent
builds, and names torch's OpenMP runtime, which is loaded already, so that no second
thread pool appears.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

__all__ = ["load_library", "source"]

_FOLDER = Path(__file__).parent
_logger = logging.getLogger(__name__)


def source() -> str:
    """The C++ source of all kernels as one translation unit."""
    text = ""
    for name in (
        *("tree_attention.cpp", "kv_compact.cpp", "fill_tree.cpp"),
        *("bigram.cpp", "tree_walk.cpp"),
    ):
        text += (_FOLDER / name).read_text()
    # Headers are inlined, so that the cache key covers them too.
    for header in ("simd.hpp", "tiles.hpp"):
        text = text.replace(f'#include "{header}"\n', (_FOLDER / header).read_text())
    return text


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (after one warning) if they cannot be built."""
    try:
        # Imported here: it takes a second, and is only needed on CPU.
        from torch._inductor.codecache import CppCodeCache

        # Inductor turns contraction off; without fused multiply-adds half of the
        # arithmetic throughput is lost.
        library = CppCodeCache.load(source(), extra_flags=("-ffp-contract=fast",))
        _declare(library)
    except Exception as error:  # a private API: whatever fails, the reference works
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _logger.warning(
            "PPD's C++ kernels could not be compiled, using slow torch code instead "
            "(install g++ to fix this): %s",
            reason,
        )
        return None
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int64
    real: Any = ctypes.c_double
    attention = library.ppd_tree_attention
    attention.argtypes = [pointer] * 4 + [integer] * 11 + [real, real, integer]
    attention.restype = ctypes.c_int
    compact = library.ppd_kv_compact
    compact.argtypes = [pointer, integer, pointer, pointer, integer]
    compact.restype = integer
    fill = library.ppd_fill_trees
    fill.argtypes = [
        *(pointer, integer, pointer, pointer, pointer, integer),
        *(pointer, pointer, integer, pointer),
    ]
    fill.restype = None
    learn = library.ppd_learn_bigrams
    learn.argtypes = [
        *(pointer, integer, pointer, pointer, integer),
        *(ctypes.c_float, ctypes.c_float),
    ]
    learn.restype = None
    walk = library.ppd_walk_trees
    walk.argtypes = [
        *(pointer, integer, integer, *[pointer] * 6, integer),
        *[pointer] * 6,
    ]
    walk.restype = integer
    match = library.ppd_match_ngrams
    match.argtypes = [
        *(pointer, integer, integer, pointer, integer, pointer, pointer, integer),
        *(pointer, pointer, integer),
    ]
    match.restype = None
    library.ppd_vector_lanes.argtypes = []
    library.ppd_vector_lanes.restype = ctypes.c_int
