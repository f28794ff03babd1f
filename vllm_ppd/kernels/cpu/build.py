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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_SOURCES = ("tree_attention", "kv_compact", "fill_tree", "bigram", "tree_walk")
_HEADERS = ("simd.hpp", "tiles.hpp")
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "d": ctypes.c_double,
    "f": ctypes.c_float,
    "c": ctypes.c_int,
    "v": None,
}
# Result and argument types of the exported functions.
_SIGNATURES = {
    "ppd_tree_attention": ("c", "pppp" + 12 * "i" + "ddi"),
    "ppd_kv_compact": ("i", "pippi"),
    "ppd_fill_trees": ("v", "pipppippip"),
    "ppd_learn_bigrams": ("v", "pippiff"),
    "ppd_walk_trees": ("i", "pii" + 6 * "p" + "i" + 6 * "p"),
    "ppd_match_ngrams": ("v", "piipippippi"),
    "ppd_vector_lanes": ("c", ""),
}
_logger = logging.getLogger(__name__)


def struct(pointers: Sequence[str], integers: Sequence[str]) -> Any:
    """The ctypes mirror of a C++ struct: its pointers first, then its int64 fields."""
    fields = [(name, ctypes.c_void_p) for name in pointers]
    fields += [(name, ctypes.c_int64) for name in integers]  # type: ignore[misc]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


def source() -> str:
    """The C++ source of all kernels as one translation unit."""
    text = "".join((_FOLDER / f"{name}.cpp").read_text() for name in _SOURCES)
    # Headers are inlined, so that the cache key covers them too.
    for header in _HEADERS:
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
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = _TYPES[result]
            function.argtypes = [_TYPES[letter] for letter in arguments]
    except Exception as error:  # a private API: whatever fails, the reference works
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _logger.warning(
            "PPD's C++ kernels could not be compiled, using slow torch code instead "
            "(install g++ to fix this): %s",
            reason,
        )
        return None
    return library
