"""Entry point that vLLM calls once in every process (``vllm.general_plugins``).

It only makes vLLM accept ``method: "ppd"``. Without that method it costs nothing and
changes nothing; all checks happen when PPD is selected.
"""

from __future__ import annotations

import logging

# Below vLLM's logger, so that its handlers and level apply.
logger = logging.getLogger("vllm.ppd")


def register() -> None:
    """Make vLLM accept PPD as a speculation method. Idempotent; never raises."""
    try:
        from vllm_ppd.engine.patches import apply_patches

        apply_patches()
    except Exception as error:
        # vLLM calls this unguarded: raising would stop it for every user.
        logger.warning(
            "vllm-ppd could not hook into this version of vLLM (%s: %s); "
            "speculative decoding with method 'ppd' is not available",
            type(error).__name__,
            error,
        )
