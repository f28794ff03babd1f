"""The adapter between the pure core and vLLM; the only package that imports vLLM."""
