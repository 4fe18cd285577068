"""Adapters and the engine side of vllm-lora; importing this is instant."""

__version__ = "0.1.0"
