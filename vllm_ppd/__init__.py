"""Parallel Prompt Decoding for vLLM: a served model speculates by itself."""

__version__ = "0.1.0"
