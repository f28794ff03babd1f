"""C++ kernels for vLLM's CPU backend, compiled at first use."""
