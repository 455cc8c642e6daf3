"""The target's side on vLLM's V2 model runner."""
