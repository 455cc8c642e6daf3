"""All uses of private vLLM symbols; no other part of the package touches vLLM's internals."""
