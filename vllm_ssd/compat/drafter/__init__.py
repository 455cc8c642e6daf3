"""Private vLLM symbols that the drafter uses."""
