"""What runs in vLLM's worker: requests, drafts for their next rounds, and the metrics about them."""
