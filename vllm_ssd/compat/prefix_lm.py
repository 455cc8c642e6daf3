"""Prefix LMs: within a forward their tokens attend to later ones, too."""

from __future__ import annotations

PREFIX_LMS = ("HrmTextForCausalLM",)
"""Architectures with `PrefillPrefixLMAttention`: vLLM 0.32 forgoes chunked prefill and prefix caching for them, but not
speculation."""
