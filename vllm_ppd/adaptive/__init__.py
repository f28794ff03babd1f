"""Choosing the draft length while serving; imports no vLLM."""
