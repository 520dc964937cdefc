"""The vLLM engine: vLLM inside the process of each rank."""
