"""Which trees give the most tokens per second; imports no vLLM."""
