"""Speculative speculative decoding for vLLM: the next drafts are ready before the verification ends."""

__version__ = "0.1.0"
