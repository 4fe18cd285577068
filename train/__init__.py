"""Training: rows in, adapter folder out. Imports neither serve nor vllm."""
