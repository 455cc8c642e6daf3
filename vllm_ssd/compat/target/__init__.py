"""Private vLLM symbols that the target's side uses."""
