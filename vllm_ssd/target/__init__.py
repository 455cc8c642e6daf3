"""The target's side, in vLLM's worker: requests, drafts for their next rounds, and metrics."""
