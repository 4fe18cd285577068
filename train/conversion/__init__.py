"""Any PEFT adapter as a LoRA that a server takes: read it, factor what it changes, prove it, write it."""
