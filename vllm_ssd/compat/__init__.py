"""Every private vLLM symbol that this package touches, and nothing else touches vLLM's insides."""
