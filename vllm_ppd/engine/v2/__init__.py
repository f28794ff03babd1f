"""PPD in vLLM's V2 model runner: everything per request stays on the device."""
