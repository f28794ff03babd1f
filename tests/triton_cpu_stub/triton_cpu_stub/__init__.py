"""A Triton backend that compiles nothing: with TRITON_INTERPRET=1 none is needed.

Triton wants an active driver before it interprets kernels, and vLLM's CPU platform
wants a backend called "cpu" before it uses Triton at all. Put this folder's parent
on the path of a process (see tests/engine/v2) and both find one.
"""
