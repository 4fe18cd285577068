"""The front side and the command line. Imports vllm_lora_ext; train only lazily, for its verbs."""
