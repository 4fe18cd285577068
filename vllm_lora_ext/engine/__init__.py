"""The engine side: what runs inside vLLM's processes. The only code of this package that imports vllm."""
