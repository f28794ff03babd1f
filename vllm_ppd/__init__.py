"""Speculative decoding for vLLM without a draft model: Parallel Prompt Decoding."""

__version__ = "0.1.0"
