"""The target's side on vLLM's V1 model runner."""
