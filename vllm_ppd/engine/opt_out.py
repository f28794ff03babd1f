"""Requests that want no guesses."""

from __future__ import annotations

from typing import Any


def opts_out(extra_args: dict[str, Any] | None) -> bool:
    """Whether a request asks not to be speculated for: ``extra_args={"ppd": False}``.

    Also set through ``vllm_xargs`` in the OpenAI API, which knows no booleans.
    """
    wish = (extra_args or {}).get("ppd")
    return wish is not None and str(wish).lower() in ("false", "0", "off", "no")
